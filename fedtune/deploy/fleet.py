"""Flower's fleet API as it passes between a site and the coordinator: eleven calls, and of each what it may
say.

A member's keys open this door and no other of Flower's: its control API starts code on every node. So a
request is read by the shapes below and written
anew; method, path and headers are ours. Of Flower's app (FAB) nothing travels: a site runs the two lines that
it has itself (app.py), and `get-fab`, the
twelfth call, is answered by its own passage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedtune.deploy.protobuf import Field, Shape, Table, read, write
from fedtune.errors import FedtuneError, Refused

PREFIX = "/v1/fleet/"
GET_RUN, GET_FAB, HEARTBEAT = "get-run", "get-fab", "send-node-heartbeat"
OBJECT = 64 << 10  # bytes of an object: an outcome or a greeting's answer has 4 KiB
OBJECTS = {
    b"Message",
    b"RecordDict",
    b"ConfigRecord",
}  # of Flower's types those that our messages are made of; arrays travel over the exchange
CHILDREN = 4  # objects inside one
BEAT = 60.0  # seconds between two heartbeats, at most: Flower takes a node for present for twice as long
HEADERS = {  # lower-case name -> longest value, of a request
    "flwr-public-key": 512, "flwr-timestamp": 64, "flwr-signature": 512,
    "flwr-package-name": 16, "flwr-package-version": 32, "flwr-component-name": 32,
}  # fmt: skip
BACK = {"content-type": 64, "flwr-version-incompatibility-message": 1024}  # of an answer
PROTOBUF = "application/protobuf"

NODE: Shape = {1: Field("node_id", "number")}
METADATA: Shape = {
    1: Field("run_id", "number"),
    2: Field("message_id", "text", 128),
    3: Field("src_node_id", "number"),
    4: Field("dst_node_id", "number"),
    5: Field("reply_to_message_id", "text", 128),
    6: Field("group_id", "text", 128),
    7: Field("ttl", "double"),
    8: Field("message_type", "text", 64),
    9: Field("created_at", "double"),
    10: Field("src_task_id", "number"),
    11: Field("dst_task_id", "number"),
}
ERROR: Shape = {1: Field("code", "number"), 2: Field("reason", "bytes", 4096)}
MESSAGE: Shape = {
    1: Field("metadata", "table", 1024, 1, METADATA),
    2: Field("content", "bytes", 0),
    3: Field("error", "table", 4096, 1, ERROR),
}
TREE: Shape = {1: Field("object_id", "hash", 64), 2: Field("children", "table", 1024, CHILDREN)}
ON_NODE: Shape = {1: Field("node", "table", 16, 1, NODE)}
CALLS: Mapping[str, Shape] = {
    "register-node": {1: Field("public_key", "bytes", 512)},
    "activate-node": {1: Field("public_key", "bytes", 512), 2: Field("heartbeat_interval", "double")},
    "deactivate-node": NODE,
    "unregister-node": NODE,
    HEARTBEAT: {**ON_NODE, 2: Field("heartbeat_interval", "double")},
    "pull-messages": {**ON_NODE, 2: Field("message_ids", "text", 128, 0)},
    "push-messages": {
        **ON_NODE,
        2: Field("messages_list", "table", 8192, 1, MESSAGE),
        3: Field("message_object_trees", "table", 2048, 1, TREE),
        4: Field("clientapp_runtime_list", "bytes", 8),
    },
    GET_RUN: {**ON_NODE, 2: Field("run_id", "number")},
    "push-object": {
        **ON_NODE,
        2: Field("run_id", "number"),
        3: Field("object_id", "hash", 64),
        4: Field("object_content", "bytes", OBJECT),
        5: Field("session_id", "text", 64),
    },
    "pull-object": {**ON_NODE, 2: Field("run_id", "number"), 3: Field("object_id", "hash", 64)},
    "confirm-message-received": {
        **ON_NODE,
        2: Field("run_id", "number"),
        3: Field("message_object_id", "hash", 64),
    },
}
LARGEST = {"push-object": OBJECT + 1024, "push-messages": 16 << 10}  # bytes of a request
SMALL = 2048  # of every other one


@dataclass(frozen=True)
class Call:
    """A request that may pass: its name, what it says, its headers."""

    name: str
    says: Table
    headers: Mapping[str, str]

    @property
    def path(self) -> str:
        return PREFIX + self.name

    @property
    def body(self) -> bytes:
        return write(self.says, CALLS[self.name])

    @property
    def key(self) -> str:
        """The node's public key, by which Flower knows it."""
        return self.headers.get("flwr-public-key", "")


def longest(path: str) -> int:
    """Bytes of a request's body. Raises FedtuneError E806 for a path that is none of the calls."""
    name = path.removeprefix(PREFIX)
    if path != PREFIX + name or name not in CALLS:
        raise FedtuneError(
            "E806",
            f"a call to {path[:80]!r}",
            f"one of Flower's fleet API under {PREFIX}",
            "use fedtune client",
        )
    return LARGEST.get(name, SMALL)


def admitted(method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes) -> Call:
    """A request as it may pass. Raises FedtuneError E806, Refused W601, W606, W607."""
    if method != "POST":
        raise FedtuneError("E806", f"method {method[:16]!r}", "POST", "use fedtune client")
    if len(body) > longest(path):
        raise Refused(
            "W606",
            f"{len(body)} bytes for {path}",
            f"at most {longest(path)}",
            "send payloads over the exchange",
        )
    name = path.removeprefix(PREFIX)
    says = read(body, CALLS[name])
    for interval in says.get("heartbeat_interval", ()):
        if not (isinstance(interval, float) and 1.0 <= interval <= BEAT):
            raise Refused(
                "W606", f"a heartbeat every {interval!r} s", f"1 to {BEAT:.0f} s", "use fedtune client"
            )
    if name == "push-object":
        check_object(says)
    return Call(name, says, picked(headers, HEADERS))


def picked(headers: Iterable[tuple[str, str]], allowed: Mapping[str, int]) -> dict[str, str]:
    """Headers of an allow list, by lower-case name; all others are left out. Raises Refused W601 for one that
    stands twice or holds what no header may."""
    kept: dict[str, str] = {}
    for given, value in headers:
        name = given.lower()
        if name not in allowed:
            continue
        if name in kept or len(value) > allowed[name] or not (value.isascii() and value.isprintable()):
            raise Refused(
                "W601",
                f"a header '{name}' that comes twice, is too long or not printable",
                "each once, in ASCII",
                "use fedtune client",
            )
        kept[name] = value
    return kept


def check_object(says: Table) -> None:
    """An object is one of those that our messages are made of, and what its name says. Raises Refused W601,
    W606."""
    content, name = (says.get(part, [b""])[0] for part in ("object_content", "object_id"))
    head, _, body = content.partition(b"\0") if isinstance(content, bytes) else (b"", b"", b"")
    parts = head.split(b" ")
    if len(parts) != 3 or parts[0] not in OBJECTS or parts[2] != str(len(body)).encode():
        raise Refused(
            "W601",
            f"an object of type {parts[0].decode(errors='replace')[:40]!r}",
            "a message, a record dict or a config record",
            "send payloads over the exchange",
        )
    if parts[1].count(b",") >= CHILDREN:
        raise Refused(
            "W606",
            f"an object of {parts[1].count(b',') + 1} others",
            f"at most {CHILDREN}",
            "use fedtune client",
        )
    if not isinstance(content, bytes) or hashlib.sha256(content).hexdigest() != name:
        raise Refused(
            "W601", "an object that does not match its hash", "the bytes that its name says", "send it again"
        )
