"""The frame of a message: one protobuf message whose last two fields, payload and digest, are written and
found by hand.

So the numbers are copied once when sent and not at all when received, and nothing can be altered, cut or
appended unnoticed:

    fields 1 to 16 | tag 17, length, payload | tag 15, length 32, SHA-256 of everything before this tag
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from fedtune.errors import Refused
from fedtune.wire.v1 import message_pb2 as pb

VERSIONS = (1, 2)  # 2: levels in planes; a message says the first version whose readers know it
PAYLOAD, SEAL = b"\x8a\x01", b"\x7a\x20"  # tag of field 17; tag of field 15 and its length, 32
METRICS, ENTRIES = 64, 4096  # most metrics, most tensors of a named message
PART = 1024  # most bytes of one metric or entry
FIELDS = 64  # most fields besides metrics and entries; 17 are known today, more may be added


def refuse(code: str, found: str, expected: str, do: str) -> Refused:
    """A refusal; what a message said is cut, so that it cannot flood a log."""
    return Refused(code, found[:200], expected[:200], do)


def damaged(found: str) -> Refused:
    return refuse(
        "W601",
        found,
        "a whole message in fedtune's wire format",
        "the message was dropped; the sender should send it again",
    )


def sealed(message: pb.Message, payload: Sequence[bytes]) -> bytes:
    """The message with its payload (parts of it, in order) and the digest at its end."""
    size = sum(len(part) for part in payload)
    parts = [message.SerializeToString(deterministic=True)]
    if size:
        parts += [PAYLOAD, to_varint(size), *payload]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join((*parts, SEAL, digest.digest()))


def opened(data: bytes) -> tuple[pb.Message, memoryview]:
    """The message in `data`, if it is whole, without its payload, and the payload (a view). Raises W601,
    W602, W606."""
    view, tail = memoryview(data), len(SEAL) + 32
    if len(data) < tail or view[-tail:-32] != SEAL:
        raise damaged(f"{len(data)} bytes without a seal")
    if hashlib.sha256(view[:-tail]).digest() != view[-32:]:
        raise damaged("a digest that is not the message's")
    before, start, end = scan(data)
    try:
        message = pb.Message.FromString(b"".join((view[:before], view[end:])))
    except DecodeError:
        raise damaged("bytes that are no protobuf message") from None
    if message.version not in VERSIONS:
        raise refuse(
            "W602",
            f"version {message.version}",
            f"version {VERSIONS[0]} to {VERSIONS[-1]}",
            "install the same version of fedtune on both sides",
        )
    return message, view[start:end]


def scan(data: bytes) -> tuple[int, int, int]:
    """Where the payload field begins, where its bytes begin, and where they end: three times the end, if
    there is none.

    Walks the top-level fields, so that no count of parts can make the parser take much more memory than the
    message has bytes.
    Raises W601, W606.
    """
    at, seen, found = 0, {10: 0, 11: 0, 0: 0}, (len(data), len(data), len(data))
    most = {10: METRICS, 11: ENTRIES, 0: FIELDS}
    while at < len(data):
        begin = at
        tag, at = varint(data, at)
        wire, number = tag & 7, tag >> 3
        if wire == 0:
            _, at = varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = varint(data, at)
            if number == 17:
                if found[0] < len(data):
                    raise damaged("two payloads")
                found = begin, at, at + size
            at += size
            if number in (10, 11) and size > PART:
                raise refuse("W606", f"a part of {size} bytes", f"at most {PART}", "shorten the names")
        else:
            raise damaged(f"a field of wire type {wire}")
        group = number if number in (10, 11) else 0
        seen[group] += 1
        if seen[group] > most[group]:
            raise refuse(
                "W606",
                f"more than {most[group]} parts",
                f"at most {most[group]}",
                "send fewer metrics or tensors",
            )
    if at != len(data):
        raise damaged("a field that ends after the message")
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number and where it ends. Raises W601."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise damaged("a number that does not end")


def to_varint(value: int) -> bytes:
    """A number in base 128, lowest digit first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
