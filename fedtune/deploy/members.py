"""What each member may ask of Flower through the gateway: one node, bound to its certificate, and no more
calls and bytes than an honest site makes.

The newest node that a member has activated is its node; calls of any other are refused, and the run's process
greets bound nodes only (`bound`), so that a
thousand made-up nodes cost it nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.deploy.fleet import Call
from fedtune.deploy.protobuf import Field, number_of, read
from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.exchange.grpc_errors import NoRoom

NODES = "nodes.json"  # in the coordinator's home: member -> its node
NODE_REPLY = {1: Field("node_id", "number")}
# what is counted -> at once, a second; a site's SuperNode makes a dozen calls a ticket, and asks every 3 s
RATES = {
    "calls": (400.0, 40.0),
    "nodes": (6.0, 1 / 20),
    "answers": (64.0, 4.0),
    "bytes": (float(4 << 20), float(64 << 10)),
}


@dataclass
class Member:
    """One member: its node, and what is left of each of its allowances."""

    key: str = ""
    node: int = 0
    left: dict[str, float] = field(default_factory=lambda: {what: most for what, (most, _) in RATES.items()})
    since: float = field(default_factory=time.monotonic)

    def take(self, name: str, wanted: Mapping[str, float], now: float) -> None:
        """Raises NoRoom; nothing is taken then."""
        passed, self.since = now - self.since, now
        self.left = {
            what: min(most, self.left[what] + passed * again) for what, (most, again) in RATES.items()
        }
        for what, amount in wanted.items():
            if self.left[what] < amount:
                raise NoRoom(f"more {what} of '{name}' than a site makes", "fewer", 2.0)
        for what, amount in wanted.items():
            self.left[what] -= amount


class Members:
    """All members at one gateway. Safe between threads."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock, self._lock = home / NODES, clock, threading.Lock()
        self._members = {name: Member(key, node) for name, (key, node) in read_nodes(self.path).items()}
        self._write()

    def admit(self, name: str, call: Call) -> None:
        """Raises FedtuneError E806 for a node that is not the member's, NoRoom (E804) for more than is its
        due."""
        wanted = {"calls": 1.0}
        if call.name in ("register-node", "activate-node"):
            wanted["nodes"] = 1.0
        elif call.name == "push-messages":
            wanted["answers"] = 1.0
        elif call.name == "push-object":
            wanted["bytes"] = float(len(call.body))
        with self._lock:
            member = self._members.setdefault(name, Member(since=self.clock()))
            member.take(name, wanted, self.clock())
            if "nodes" in wanted:
                return
            other = next(
                (whose for whose, one in self._members.items() if one.key == call.key and whose != name), ""
            )
            if other or (member.key and (member.key, member.node) != (call.key, node_of(call))):
                raise FedtuneError(
                    "E806",
                    sentence=f"another fedtune client is connected as '{name}'",
                    do="end one of the two",
                )

    def answered(self, name: str, call: Call, reply: bytes) -> None:
        """Learn from what Flower, which has checked the key's signature, has taken."""
        with self._lock:
            member = self._members.setdefault(name, Member(since=self.clock()))
            if call.name == "activate-node":
                node = number_of(read(reply, NODE_REPLY), "node_id")
            elif call.name in ("deactivate-node", "unregister-node"):
                node = 0
            elif member.node or call.name == "register-node":
                return
            else:
                node = node_of(call)
            if (member.key, member.node) != (key := call.key if node else "", node):
                member.key, member.node = key, node
                self._write()

    def _write(self) -> None:
        content = {
            name: [member.key, member.node] for name, member in sorted(self._members.items()) if member.node
        }
        write_atomic(self.path, json.dumps(content).encode())


def node_of(call: Call) -> int:
    return (
        number_of(call.says, "node_id") if "node_id" in call.says else number_of(call.says, "node", "node_id")
    )


def read_nodes(path: Path) -> dict[str, tuple[str, int]]:
    """Member -> key and node, as the gateway has written them; none where it has not, or they cannot be read:
    then they are learned anew."""
    try:
        tree = json.loads(path.read_bytes())
        return {str(name): (str(key), int(node)) for name, (key, node) in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def bound(home: Path) -> Callable[[], Mapping[str, int] | None]:
    """For the run's process: member -> node as the gateway knows them now; None where there is no gateway."""
    path = home / NODES

    def now() -> Mapping[str, int] | None:
        return {name: node for name, (_, node) in read_nodes(path).items()} if path.exists() else None

    return now
