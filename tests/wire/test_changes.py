"""Whole numbers as what changed of them: short, exact, and nothing but what is whole gets in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import Refused
from fedtune.schema import Schema
from fedtune.wire import (
    EVERYONE,
    Expect,
    Header,
    decode,
    decode_state,
    encode_changes,
    encode_state,
    is_whole,
    rice,
)

HEADER = Header("run", 3, EVERYONE, "train", "base")
STATE = {
    "a": np.int32([0, 7, -300_000, 0, 2]),
    "b": np.uint32([[5, 2**32 - 1]]),
    "c": np.int64([-(2**60), 1]),
    "d": np.zeros((0, 3), np.int8),
}
EXPECT = Expect("run", 3, EVERYONE, "train", "base", Schema.of(STATE), frozenset({"state", "changes"}))
ALL = {name: np.ones(value.shape, bool) for name, value in STATE.items()}


def test_a_rice_code_on_paper() -> None:
    """5, 0, 10 with b = 2: quotients 1, 0, 2 in unary 01 1 001, remainders 1, 0, 2 in two bits each; bits
    fill bytes from the lowest."""
    code = rice.pack(np.uint64([5, 0, 10]))
    assert code == bytes([2, 1, 0b00100110, 0b00100001])
    assert rice.unpack(code, 0, 3)[0].tolist() == [5, 0, 10]


@given(st.lists(st.integers(0, 63).flatmap(lambda bits: st.integers(0, 2**bits - 1)), max_size=40))
@settings(max_examples=300)
def test_rice_codes_come_back(numbers: list[int]) -> None:
    values = np.array(numbers, np.uint64)
    code = rice.pack(values)
    found, end = rice.unpack(b"x" + code + b"y", 1, len(values))
    assert found.tolist() == numbers and end == 1 + len(code)


def test_numbers_of_a_normal_shape_cost_what_they_hold() -> None:
    """The entropy of a rounded normal of deviation s is log2(s sqrt(2 pi e)) bits; the code is within 2 % of
    it here."""
    deviation = 2.0**18
    numbers = np.rint(np.random.default_rng(0).normal(size=4096) * deviation).astype(np.int64)
    data = encode_changes({"x": numbers.astype(np.int32)}, {"x": np.ones(4096, bool)}, HEADER)
    entropy = 4096 * np.log2(deviation * (2 * np.pi * np.e) ** 0.5) / 8
    assert 0 < len(data) - entropy < 0.02 * entropy + 200  # a header


def test_changes_arrive_exactly_and_the_rest_is_what_was_held() -> None:
    _, got = decode_state(encode_changes(STATE, ALL, HEADER), EXPECT)
    assert {n: (v.dtype, v.shape, v.tobytes()) for n, v in got.items()} == {
        n: (v.dtype, v.shape, v.tobytes()) for n, v in STATE.items()
    }
    held = {
        "a": np.int64([0, 8, -300_000, 0, 9]),
        "b": np.uint32([[5, 0]]),
        "c": STATE["c"],
    }  # no d: zeros, of which there are none
    marked = {n: held.get(n, np.zeros(v.shape)) != v for n, v in STATE.items()}
    data = encode_changes(STATE, marked, replace(HEADER, since=2))
    _, got = decode_state(data, EXPECT, (2, held))
    assert all(got[n].tolist() == v.tolist() and got[n].dtype == v.dtype for n, v in STATE.items())
    for other in ((0, {}), (1, held)):
        with pytest.raises(Refused, match=r"W604.*changes relative to the broadcast of round 2"):
            decode_state(data, EXPECT, other)


def test_a_state_may_still_travel_as_it_is() -> None:
    _, got = decode_state(encode_state(STATE, HEADER), EXPECT)
    assert all(got[n].tolist() == v.tolist() for n, v in STATE.items())


def test_changes_are_no_answer_and_only_whole_numbers_can_be_them() -> None:
    with pytest.raises(Refused, match="W603"):
        decode(encode_changes(STATE, ALL, HEADER), EXPECT)
    with pytest.raises(Refused, match="W603"):
        decode_state(encode_changes(STATE, ALL, HEADER), replace(EXPECT, kinds=frozenset({"state"})))
    assert (
        is_whole(STATE)
        and not is_whole({})
        and not is_whole({"x": np.float32([1])})
        and not is_whole({"x": np.int64([2**62])})
    )


def test_what_does_not_fit_is_refused_before_memory_is_taken() -> None:
    from tests.wire.fuzz import reseal

    data = encode_changes(STATE, ALL, HEADER)
    body = data[:-34]
    for at in range(len(body) - 60, len(body)):  # every byte of the payload, and what comes before it
        for flip in (1, 0x40, 0xFF):
            bad = bytearray(body)
            bad[at] ^= flip
            try:
                _, got = decode_state(reseal(bytes(bad)), EXPECT)
            except Refused as error:
                assert error.code in ("W601", "W603", "W604", "W606", "W607")
            else:
                assert all(got[n].shape == v.shape and got[n].dtype.kind in "iu" for n, v in STATE.items())
    many = {"a": np.int32([1, 2, 3])}
    short = replace(EXPECT, schema=Schema.of(many))
    for payload, text in (
        (b"\x04", "4 changes to 3"),
        (b"\x03\x40", "width"),
        (b"\x03\x02\x01\xff\x00", "numbers in a Rice code"),
        (b"\x01\x00\x01\x20\x00", "beyond"),
    ):
        with pytest.raises(Refused, match=f"W601.*{text}"):
            decode_state(with_payload(many, payload), short)


def with_payload(state: dict[str, np.ndarray], payload: bytes) -> bytes:
    """A message of changes whose payload is another: what only a dishonest sender can make."""
    from fedtune.wire.frame import sealed
    from fedtune.wire.message import DTYPES, headed

    message = headed(HEADER, "changes", Schema.of(state), 1.0)
    message.dtypes = bytes(DTYPES[value.dtype.name] for value in state.values())
    return sealed(message, [payload])
