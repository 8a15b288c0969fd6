"""What the body service knows of a client: its admission, its session and lease, and what it asked to be
held.

The service is stateless in what counts: everything here may be lost at any moment and is said again by the
client.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fedtune.errors import Refused
from fedtune.split.frames import FLOATS, VERSION
from fedtune.wire.v1 import split_pb2 as pb

REMEMBERED = 8192  # digests of a session: 4096 micro-batches, far more than any window
Admit = Callable[
    [pb.Hello, str], bool
]  # hello and the peer's name (its certificate's, "" without TLS) -> whether it may


class Tokens:
    """Bearer tokens of runs' rounds: made by the coordinator, carried by its message to the client, shown in
    HELLO.

    A token is the HMAC-SHA-256 of run, round, client and the name in its certificate under a key that
    coordinator and service share. So a service
    that was killed and started again admits whoever it admitted before, and under TLS a token that was seen
    by others is of no use to them.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = key or secrets.token_bytes(32)

    def issue(self, run: str, round: int, client: int, peer: str = "") -> str:
        """`peer` is the name in the client's certificate; "" without TLS."""
        return hmac.new(self.key, repr((run, round, client, peer)).encode(), hashlib.sha256).hexdigest()

    def admit(self, hello: pb.Hello, peer: str = "") -> bool:
        right = self.issue(hello.run, hello.round, hello.client, peer)
        return hmac.compare_digest(right.encode(), hello.token.encode())


@dataclass(frozen=True)
class Offer:
    """The body that a service runs: base model ("": not known to who holds a part of it), fingerprint of the
    part, its blocks, the width of hidden states."""

    model: str
    part: str
    first: int
    last: int
    width: int


@dataclass(eq=False)
class Session:
    """One client in one round. `known` outlives a broken connection for a lease, so that a number never means
    two things."""

    hello: pb.Hello
    seen: float
    connection: Any  # fedtune.split.service.Connection; None while the client is away
    granted: int = 0
    flight: int = 0
    known: OrderedDict[tuple[int, int], bytes] = field(default_factory=OrderedDict)

    @property
    def turn(self) -> tuple[str, int]:
        return (self.hello.run, self.hello.round)

    @property
    def owner(self) -> tuple[str, int]:
        return (self.hello.run, self.hello.client)

    def admit(self, kind: int, sequence: int, digest: bytes) -> None:
        """Note that this number means these bytes. Raises Refused S717 where it meant others, or is older
        than what is remembered."""
        before = self.known.setdefault((kind, sequence), digest)
        if before != digest:
            raise Refused(
                "S717",
                f"other bytes than before under number {sequence}",
                "the same micro-batch",
                "use a new number for every micro-batch",
            )
        if len(self.known) > REMEMBERED:
            self.known.popitem(last=False)


def check(hello: pb.Hello, offer: Offer, admit: Admit, peer: str) -> None:
    """Raises Refused W602, S702, S712 for a HELLO that cannot be served."""
    if hello.version != VERSION:
        raise Refused(
            "W602",
            f"version {hello.version} of the split stream",
            f"version {VERSION}",
            "use the same version of fedtune on both sides",
        )
    if not re.fullmatch("[0-9a-f]{32}", hello.session):
        raise Refused(
            "S712", "a session that is not 32 hex digits", "16 random bytes", "use fedtune's client"
        )
    if not admit(hello, peer):
        found = f"no valid token of client {hello.client} for round {hello.round}"
        raise Refused(
            "S712",
            found,
            "the token that came with this round's message",
            "answer what was asked, in the round in which it was asked",
        )
    for word in ("model", "part", "first", "last", "width"):
        found, own = getattr(hello, word), getattr(offer, word)
        if found != own and own != "":
            raise Refused(
                "S702",
                f"{word} {str(found)[:80]!r}",
                repr(own),
                "use the same recipe and base model on both sides",
            )
    if (
        hello.number not in FLOATS
        or (hello.number != pb.NUMBER_INT8 and hello.group)
        or hello.group > hello.width
    ):
        raise Refused(
            "W603",
            f"answers in numbers of type {hello.number} by {hello.group}",
            f"one of {sorted(FLOATS)}",
            "use fedtune's client",
        )


class HeldSamples:
    """Bytes that clients agreed to leave here: in memory only, within a budget, for a limited time; whoever
    holds most gives way first."""

    def __init__(self, budget: int, seconds: float) -> None:
        self.budget, self.seconds = budget, seconds
        self.entries: dict[Hashable, OrderedDict[Hashable, tuple[Any, int, float]]] = {}
        self.sizes: dict[Hashable, int] = {}
        self.lock = threading.Lock()

    @property
    def size(self) -> int:
        with self.lock:
            return sum(self.sizes.values())

    def put(self, owner: Hashable, key: Hashable, value: Any, size: int) -> None:
        """Hold a value of `size` bytes, if the budget allows it at all."""
        with self.lock:
            self.remove(owner, key)
            if size > self.budget:
                return
            self.entries.setdefault(owner, OrderedDict())[key] = (
                value,
                size,
                time.monotonic() + self.seconds,
            )
            self.sizes[owner] = self.sizes.get(owner, 0) + size
            while sum(self.sizes.values()) > self.budget:
                largest = max(self.sizes, key=lambda each: self.sizes[each])
                self.remove(largest, next(iter(self.entries[largest])))

    def get(self, owner: Hashable, keys: Iterable[Hashable]) -> list[Any]:
        """The values held, None where there is none."""
        now, found = time.monotonic(), []
        with self.lock:
            for key in keys:
                entry = self.entries[owner].get(key) if owner in self.entries else None
                found.append(entry[0] if entry and entry[2] > now else None)
        return found

    def drop(self, owner: Hashable, key: Hashable = None) -> None:
        """Forget one value, or all of an owner."""
        with self.lock:
            if key is not None:
                self.remove(owner, key)
            else:
                self.entries.pop(owner, None)
                self.sizes.pop(owner, None)

    def sweep(self) -> None:
        """Forget what is past its time."""
        now = time.monotonic()
        with self.lock:
            late = [
                (owner, key)
                for owner, held in self.entries.items()
                for key, entry in held.items()
                if entry[2] <= now
            ]
            for owner, key in late:
                self.remove(owner, key)

    def remove(self, owner: Hashable, key: Hashable) -> None:
        held = self.entries.get(owner)
        if held is not None and key in held:
            self.sizes[owner] -= held.pop(key)[1]
            if not held:
                del self.entries[owner], self.sizes[owner]
