"""Protocol buffers by a shape, against Google's own: what is read, what is refused, and that it is written as they do."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from fedtune.deploy.fleet import CALLS
from fedtune.deploy.protobuf import DEPTH, Field, Shape, cut, number_of, read, varied, varint, write
from fedtune.errors import FedtuneError, Refused
from tests.deploy.flowers import REQUESTS, body

SHAPE: Shape = {
    1: Field("number", "number"),
    2: Field("double", "double"),
    3: Field("text", "text", 4),
    4: Field("bytes", "bytes", 3, 2),
    5: Field("hash", "hash", 64),
    6: Field("tree", "table", 64, 2),
    9: Field("other", "table", 16, 1, {1: Field("inside", "number")}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_flower_writes_is_read_and_written_as_it_was(name: str) -> None:
    assert write(read(body(name), CALLS[name]), CALLS[name]) == body(name)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 63) + 5, (1 << 64) - 1])
def test_whole_numbers(value: int) -> None:
    assert varint(b"x" + varied(value) + b"y", 1) == (value, 1 + len(varied(value)))
    assert len(varied(value)) == max(1, -(-value.bit_length() // 7))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\x01"])
def test_numbers_that_are_cut_or_too_long(data: bytes) -> None:
    with pytest.raises(Refused, match=r"^W601"):
        varint(data, 0)
    assert varint(b"\xff" * 9 + b"\x01", 0)[0] == (1 << 64) - 1


def test_every_kind_of_value() -> None:
    values: dict[str, list[Any]] = {
        "number": [300],
        "double": [0.5],
        "text": ["abcd"],
        "bytes": [b"\0\xff\1", b""],
        "hash": ["ab" * 32],
        "tree": [{"number": [1], "tree": [{"text": ["x"]}]}, {}],
        "other": [{"inside": [7]}],
    }
    data = write(values, SHAPE)
    assert read(data, SHAPE) == values and write(dict(reversed(values.items())), SHAPE) == data
    assert data.startswith(
        b"\x08\xac\x02\x11" + struct.pack("<d", 0.5) + b"\x1a\x04abcd\x22\x03\0\xff\1\x22\0\x2a\x40"
    )
    assert read(b"", SHAPE) == {} and write({}, SHAPE) == b""


def sized(number: int, content: bytes) -> bytes:
    return varied(number << 3 | 2) + varied(len(content)) + content


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (sized(7, b""), "W601"),  # no such field
        (b"\x0a\x01\x01", "W601"),  # of another type
        (b"\x1a\x02a", "W601"),  # cut
        (b"\x11" + bytes(7), "W601"),
        (sized(3, b"abcde"), "W606"),
        (sized(3, b"a\n"), "W601"),
        (sized(3, b"\xc3\xa9"), "W601"),
        (sized(5, b"AB" * 32), "W601"),
        (sized(5, b"ab" * 31), "W601"),
        (b"\x08\x01\x08\x01", "W606"),  # twice
        (sized(4, b"") * 3, "W606"),
        (b"\x11" + struct.pack("<d", float("nan")), "W607"),
        (b"\x11" + struct.pack("<d", float("inf")), "W607"),
        (sized(9, b"\x10\x01"), "W601"),  # of the shape inside
    ],
)
def test_what_a_shape_does_not_allow(data: bytes, code: str) -> None:
    with pytest.raises(Refused, match=f"^{code}"):
        read(data, SHAPE)


def test_tables_are_so_deep_and_no_deeper() -> None:
    data = b""
    for _ in range(DEPTH - 1):
        data = sized(6, data)
    assert read(data, SHAPE)
    with pytest.raises(Refused, match=r"^W606"):
        read(sized(6, data), SHAPE)


def test_numbers_by_their_way() -> None:
    said: Any = {"node": [{"node_id": [5, 6]}], "text": ["x"]}
    assert number_of(said, "node", "node_id") == 5
    assert number_of(said, "node", "none") == 0 == number_of(said, "none", "node_id") == number_of({}, "x")
    with pytest.raises(FedtuneError, match=r"W601.*no number at text"):
        number_of(said, "text")
    assert cut(b"abc", 1, 2) == b"bc"
    with pytest.raises(Refused, match=r"^W601"):
        cut(b"abc", 1, 3)
