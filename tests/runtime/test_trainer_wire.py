"""The wire between a site's worker and its script: what is sent comes, and only messages are taken."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedtune.runtime.trainer_wire import PIECE, Garbled, Wire, read_record, read_tensors

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int64([7])}


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    one, other = (Wire(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def alike(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and np.array_equal(found[name], wanted[name])
        for name in wanted
    )


def test_records_and_tensors_come_as_they_were_sent(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    one.send({"what": "train", "n": 3}, TENSORS, seconds=5.0)
    record, tensors = other.receive(1 << 10, 1 << 10, 5.0)
    assert record == {"what": "train", "n": 3} and alike(tensors, TENSORS)
    other.send({"what": "done"})
    assert one.receive(1 << 10, 0) == ({"what": "done"}, {})
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T  # not contiguous
    one.send({}, {"a": turned})
    assert alike(other.receive(1 << 10, 1 << 10, 5.0)[1], {"a": turned})


def test_a_message_may_come_in_pieces(ends: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ends
    body = save(TENSORS)
    head = json.dumps({"what": "x", "bytes": len(body)}).encode() + b"\n"
    whole = head + body
    for cut in (1, len(head) - 1, len(head), len(head) + 5, len(whole) - 1):
        one.call.sendall(whole[:cut])
        pieces = [whole[cut:]]
        plain = other.piece

        def piece(most: int, end: float | None, pieces: list[bytes] = pieces, plain: Any = plain) -> bytes:
            found = plain(most, end)
            if pieces:
                one.call.sendall(pieces.pop())
            return bytes(found)

        with monkeypatch.context() as patched:
            patched.setattr(other, "piece", piece)
            record, tensors = other.receive(len(head), len(body), 5.0)
        assert record == {"what": "x"} and alike(tensors, TENSORS)


def test_no_more_is_read_than_belongs_to_the_message(
    ends: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = ends
    said, asked = [b'{"bytes": 300000}\n', bytes(PIECE), bytes(300000 - PIECE)], list[int]()

    def piece(most: int, end: float | None) -> bytes:
        asked.append(most)
        return said.pop(0)

    monkeypatch.setattr(other, "piece", piece)
    with pytest.raises(Garbled, match="tensors that cannot be read"):
        other.receive(100, 1 << 20)
    assert asked == [PIECE, PIECE, 300000 - PIECE] and PIECE == 262144


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"x" * 21, "a line of more than 20 bytes"),
        (b"x" * 21 + b"\n", "a line of more than 20 bytes"),
        (b"nonsense\n", r"a line that is no JSON \(JSONDecodeError\)"),
        (b"[" * 20 + b"\n", "a line that is no JSON"),
        (b'[{"bytes": 0}]\n', "a record without a size"),
        (b"{}\n", "a record without a size"),
        (b'{"bytes": true}\n', "a record without a size"),
        (b'{"bytes": 1.0}\n', "a record without a size"),
        (b'{"bytes": -1}\n', "tensors of -1 bytes, where at most 9 can be"),
        (b'{"bytes": 10}\n', "tensors of 10 bytes, where at most 9 can be"),
        (b'{"bytes": 9}\n' + b"x" * 10, "more than one answer"),
        (b'{"bytes": 9}\n' + b"x" * 9, r"tensors that cannot be read \("),
    ],
    ids=repr,
)
def test_what_is_no_message_is_garbled(sent: bytes, why: str, ends: tuple[Wire, Wire]) -> None:
    ends[0].call.sendall(sent)
    with pytest.raises(Garbled, match=why):
        ends[1].receive(20, 9, 5.0)


def test_a_line_and_tensors_of_just_the_size_are_taken(ends: tuple[Wire, Wire]) -> None:
    body = save({"a": np.float32([1])})
    line = json.dumps({"bytes": len(body)}).encode()
    ends[0].call.sendall(line + b"\n" + body)
    assert alike(ends[1].receive(len(line), len(body), 5.0)[1], {"a": np.float32([1])})
    assert read_record(b'{"a": 1, "bytes": 0}') == ({"a": 1}, 0) and read_tensors(b"") == {}


def test_nobody_waits_for_ever(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    for seconds in (0.0, -1.0, 0.01):
        with pytest.raises(TimeoutError):
            other.receive(20, 9, seconds)
    for seconds in (0.0, -1.0):
        with pytest.raises(TimeoutError):
            one.send({}, None, seconds)
    with pytest.raises(TimeoutError):  # nobody reads
        one.send({}, {"a": np.zeros(1 << 21, np.float32)}, 0.05)
    one.close()
    with pytest.raises((EOFError, OSError)):
        while True:
            other.piece(PIECE, None)
    with pytest.raises(OSError):
        one.send({})
