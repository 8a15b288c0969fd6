"""How many connections one address may hold open: gRPC has no setting for it, so the process looks at its
own.

What is over the number is shut down, the newest first, before a handshake has cost anything: whoever was
there stays, and a flood from one address keeps nobody else out. Of each connection the kernel knows the far
end. A copy of its descriptor is looked at again before it is shut down, so that a number that somebody else
got meanwhile harms nobody.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections import defaultdict
from ipaddress import ip_address
from pathlib import Path

OPEN = Path("/proc/self/fd")  # Linux; elsewhere nothing is looked at
LOOK = 0.5  # seconds between two looks, or twenty times as long as one takes


class Connections:
    """The connections of one port, and who is behind them."""

    def __init__(self, port: int, each: int) -> None:
        self.port, self.each = port, each
        self.first: dict[tuple[str, int], float] = {}  # far end -> when it was seen first
        self.refused = 0

    def look(self) -> dict[str, int]:
        """Shut down what is too much; addresses -> connections that stay."""
        found = dict(self._found())
        now = time.monotonic()
        self.first = {far: self.first.get(far, now) for far in found}
        by_address: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for far in sorted(found, key=lambda far: self.first[far]):
            by_address[network(far[0])].append(far)
        for theirs in by_address.values():
            for far in theirs[self.each :]:
                self.refused += self._shut(found[far], far)
        return {address: min(len(theirs), self.each) for address, theirs in by_address.items()}

    def _found(self) -> list[tuple[tuple[str, int], int]]:
        """Far ends of this port's connections, and their descriptors."""
        try:
            names = os.listdir(OPEN)
        except OSError:
            return []
        return [(far, int(name)) for name in names if (far := self._far_end(int(name)))]

    def _far_end(self, descriptor: int) -> tuple[str, int] | None:
        """Who is at the other end; None for whatever is no connection of this port."""
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return None
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.getsockname()[1] != self.port:
                    return None
                address, port = copy.getpeername()[:2]
                return str(address), int(port)
        except OSError:  # a listener, or closed meanwhile
            return None

    def _shut(self, descriptor: int, far: tuple[str, int]) -> bool:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
            if copy.getpeername()[:2] == far:
                copy.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def watch(self, stopped: threading.Event) -> None:
        """Until the server stops."""
        pause = LOOK
        while not stopped.wait(pause):
            began = time.monotonic()
            self.look()
            pause = max(LOOK, 20 * (time.monotonic() - began))


def network(address: str) -> str:
    """What counts as one: an address, of IPv6 its /64, which one customer has as a whole."""
    known = ip_address(address.partition("%")[0])
    if known.version == 6:
        inside = known.ipv4_mapped
        return str(inside) if inside else ":".join(known.exploded.split(":")[:4])
    return str(known)
