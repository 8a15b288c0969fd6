"""Protocol buffers read by a shape: what a table may hold, how much of it, and nothing else. What is read is
written anew, so that what is passed on was
made here, byte for byte.

Only what the calls of fleet.py need: whole numbers, doubles, texts, bytes, tables.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedtune.errors import FedtuneError, Refused
from fedtune.forms import Sha256

Kind = Literal["number", "double", "text", "bytes", "hash", "table"]
DEPTH = 8  # of tables inside tables
VARINT, FIXED, SIZED = 0, 1, 2  # wire types
WIRE: dict[Kind, int] = {"number": VARINT, "double": FIXED}


@dataclass(frozen=True)
class Field:
    """One field of a table.

    longest  bytes of a text, of bytes or of a table
    many     how often it may stand
    shape    of a table; None: the same table again, a tree
    """

    name: str
    kind: Kind
    longest: int = 1024
    many: int = 1
    shape: Mapping[int, Field] | None = None


Shape = Mapping[int, Field]
Value = int | float | str | bytes | Mapping[str, Sequence["Value"]]
Table = Mapping[str, Sequence[Value]]


def read(data: bytes, shape: Shape, depth: int = DEPTH) -> dict[str, list[Value]]:
    """A table's values by name, each a list. Raises Refused W601, W606 for all that its shape does not
    allow."""
    if depth == 0:
        raise Refused("W606", f"tables more than {DEPTH} deep", "fewer", "use fedtune client")
    values: dict[str, list[Value]] = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        field = shape.get(tag >> 3)
        if field is None or tag & 7 != WIRE.get(field.kind, SIZED):
            raise Refused(
                "W601",
                f"field {tag >> 3} of type {tag & 7}",
                f"one of {', '.join(f.name for f in shape.values())}",
                "use fedtune client",
            )
        value, at = one(data, at, field, shape, depth)
        known = values.setdefault(field.name, [])
        known.append(value)
        if len(known) > field.many:
            raise Refused(
                "W606", f"'{field.name}' {len(known)} times", f"at most {field.many}", "use fedtune client"
            )
    return values


def one(data: bytes, at: int, field: Field, shape: Shape, depth: int) -> tuple[Value, int]:
    """The value that begins there, and where the next field does."""
    if field.kind == "number":
        return varint(data, at)
    if field.kind == "double":
        return finite(cut(data, at, 8), field), at + 8
    size, at = varint(data, at)
    if size > field.longest:
        raise Refused(
            "W606", f"'{field.name}' of {size} bytes", f"at most {field.longest}", "use fedtune client"
        )
    content = cut(data, at, size)
    at += size
    if field.kind == "table":
        return read(content, shape if field.shape is None else field.shape, depth - 1), at
    return (content if field.kind == "bytes" else text(content, field)), at


def text(content: bytes, field: Field) -> str:
    try:
        said = content.decode("ascii")
    except UnicodeDecodeError:
        said = "\0"
    if not said.isprintable() or (field.kind == "hash" and not Sha256.form.fullmatch(said)):
        raise Refused(
            "W601",
            f"'{field.name}' in another form",
            "64 hexadecimal digits" if field.kind == "hash" else "printable ASCII",
            "use fedtune client",
        )
    return said


def finite(content: bytes, field: Field) -> float:
    value = float(struct.unpack("<d", content)[0])
    if not math.isfinite(value):
        raise Refused("W607", f"'{field.name}' = {value}", "a finite number", "use fedtune client")
    return value


def cut(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise Refused("W601", "a field that is cut", "a whole message", "use fedtune client")
    return data[at : at + size]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number below 2**64, and where it ends."""
    value = 0
    for place in range(10):
        if at + place >= len(data):
            break
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128 and value < 1 << 64:
            return value, at + place + 1
    raise Refused("W601", "a number that is cut or too long", "one below 2**64", "use fedtune client")


def write(values: Table, shape: Shape) -> bytes:
    """The one encoding of a table: its fields in ascending order."""
    return b"".join(
        piece
        for number in sorted(shape)
        for piece in pieces(values.get(shape[number].name, ()), number, shape)
    )


def pieces(values: Sequence[Value], number: int, shape: Shape) -> Iterator[bytes]:
    field = shape[number]
    for value in values:
        yield varied(number << 3 | WIRE.get(field.kind, SIZED))
        if isinstance(value, float):
            yield struct.pack("<d", value)
        elif isinstance(value, int):
            yield varied(value)
        else:
            content = (
                write(value, shape if field.shape is None else field.shape)
                if isinstance(value, Mapping)
                else value
            )
            content = content.encode("ascii") if isinstance(content, str) else content
            yield varied(len(content)) + content


def varied(value: int) -> bytes:
    """A whole number as a varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number_of(values: Table, *path: str) -> int:
    """A number of a table inside; 0 where it is not said, as Protocol buffers have it."""
    node: Value = values
    for name in path:
        below: Sequence[Value] = node.get(name, ()) if isinstance(node, Mapping) else ()
        node = below[0] if below else 0
    if not isinstance(node, int):
        raise FedtuneError("W601", f"no number at {'.'.join(path)}", "one", "use fedtune client")
    return node
