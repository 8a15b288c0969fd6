"""Messages: what arrives is what was sent, to the bit; equal updates are equal bytes; everything else is
refused with a code."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.schema import Schema
from fedtune.types import Update
from fedtune.wire import EVERYONE, Expect, Header, decode, decode_state, encode, encode_state
from fedtune.wire.frame import SEAL, opened
from fedtune.wire.scales import rounded
from fedtune.wire.v1 import message_pb2 as pb
from tests.wire.fuzz import named

GOLDEN = Path(__file__).parents[1] / "golden"
HEADER = Header("run", 3, 2, "train", "base")
VALUES = {"b": np.float32([[1.5, -2.0, 0.1]]), "a": np.float32([3e-8, 7.0]), "s": np.array(2.5, np.float32)}
SCHEMA = Schema.of(VALUES)
EXPECT = Expect("run", 3, 2, "train", "base", SCHEMA)
UPDATE = Update.of(VALUES, 7.3, {"loss": 1.1, "acc": 0.3})
PACKED = Update({"w": np.int8([[1, 0], [-1, 3]])}, 2.0, {}, {"w": np.float32(0.5)})
PACKED_EXPECT = Expect("run", 3, 2, "train", "base", Schema.of(PACKED.tensors), frozenset({"levels"}))


def same(a: Update, b: Update) -> bool:
    """Equal to the bit, types included."""
    pairs = [(a.tensors, b.tensors), (a.scales, b.scales)]
    return (a.weight, dict(a.metrics)) == (b.weight, dict(b.metrics)) and all(
        x.keys() == y.keys()
        and all(
            x[n].dtype == y[n].dtype and x[n].shape == y[n].shape and x[n].tobytes() == y[n].tobytes()
            for n in x
        )
        for x, y in pairs
    )


def changed(data: bytes, **fields: object) -> bytes:
    """The message with other fields, sealed anew: what a dishonest client can send."""
    message = pb.Message.FromString(data)
    message.ClearField("digest")
    for name, value in fields.items():
        if isinstance(value, list):
            message.ClearField(name)  # type: ignore[arg-type]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    body = message.SerializeToString(deterministic=True)
    return body + SEAL + hashlib.sha256(body).digest()


def refused(data: bytes, expect: Expect, code: str) -> None:
    with pytest.raises(Refused) as caught:
        decode(data, expect)
    assert caught.value.code == code, str(caught.value)


def test_values_arrive_to_the_bit() -> None:
    header, update = decode(encode(UPDATE, HEADER), EXPECT)
    assert header == replace(HEADER, schema=SCHEMA.fingerprint)
    assert same(update, UPDATE)


@pytest.mark.parametrize("shape", ["tensor", "block", "kept"])
def test_levels_arrive_to_the_bit(shape: str) -> None:
    rng = np.random.default_rng(0)
    levels = {
        "a": rng.integers(-3, 4, 150).astype(np.int8),
        "b": rng.integers(-1, 2, (7, 9)).astype(np.int8),
        "z": np.zeros(3, np.int8),
    }
    sizes = {
        "tensor": lambda v: (),
        "block": lambda v: (-(-v.size // 64),),
        "kept": lambda v: (np.count_nonzero(v), 1),
    }
    scales = rounded({name: rng.random(sizes[shape](value)) * 1e-6 for name, value in levels.items()})
    update = Update(levels, 3.0, {"loss": 6.0}, scales)
    expect = replace(EXPECT, schema=Schema.of(levels), kinds=frozenset({"levels"}))
    assert same(decode(encode(update, HEADER), expect)[1], update)


@pytest.mark.parametrize(("kind", "stored"), [("ring", np.uint32), ("ring64", np.uint64)])
def test_ring_numbers_arrive(kind: str, stored: type[np.unsignedinteger]) -> None:
    update = Update({"w": np.array([0, 1, np.iinfo(stored).max], stored)}, 4.0)
    expect = replace(EXPECT, schema=Schema.of(update.tensors), kinds=frozenset({kind}))
    data = encode(update, HEADER)
    assert same(decode(data, expect)[1], update)
    other = {"ring": "ring64", "ring64": "ring"}[kind]
    with pytest.raises(Refused, match=f"W603.*'{kind}'"):
        decode(data, replace(expect, kinds=frozenset({other})))
    half = replace(expect, schema=Schema((("w", (2,)),)))
    with pytest.raises(Refused, match="W603"):
        decode(data, half)


def test_a_state_keeps_its_types_and_can_name_itself() -> None:
    state = {
        "w": np.float32([[1, 2]]),
        "seeds": np.int64([5, -(2**60)]),
        "d": np.float64(0.1),
        "n": np.zeros((0, 4), np.uint8),
    }
    data = named(encode_state(state, replace(HEADER, client=EVERYONE)), Schema.of(state))
    _, got = decode_state(data, replace(EXPECT, client=EVERYONE, schema=None, kinds=frozenset({"state"})))
    assert {name: (v.dtype, v.shape, v.tobytes()) for name, v in got.items()} == {
        name: (v.dtype, v.shape, v.tobytes())
        for name, v in ((name, np.asarray(value)) for name, value in state.items())
    }
    assert all(value.flags.writeable and value.flags.aligned for value in got.values())


def test_equal_updates_are_equal_bytes() -> None:
    turned = Update.of(
        {name: VALUES[name].copy(order="F") for name in reversed(list(VALUES))},
        7.3,
        {"acc": 0.3, "loss": 1.1},
    )
    assert encode(turned, HEADER) == encode(UPDATE, HEADER)


def test_size_is_four_bytes_a_number_and_a_header() -> None:
    big = Update.of({"w": np.zeros(10_000, np.float32)})
    assert (
        len(encode(big, HEADER)) - 40_000
        == len(encode(Update.of({"w": np.zeros(0, np.float32)}), HEADER)) + 5
    )  # tag and length of the payload


@pytest.mark.parametrize("name", ["values", "levels", "ring", "ring64", "state", "changes"])
def test_messages_of_version_1_can_be_read_for_ever(name: str) -> None:
    from tests.regen import golden

    data = bytes.fromhex((GOLDEN / f"message-v1-{name}.hex").read_text())
    expect = Expect("golden", 7, 3, "train", "b" * 64, None, frozenset({name}))
    if name == "changes":
        _, state = decode_state(data, replace(expect, schema=Schema.of(golden.accumulators())))
        np.testing.assert_array_equal(state["pool"], golden.accumulators()["pool"])
        return
    if name == "state":
        _, state = decode_state(data, expect)
        assert state["seeds"].tolist() == [-1, 2**40] and state["w"].tolist() == [0.5]
        return
    tensors = {
        "values": golden.values(),
        "levels": golden.levels(),
        "ring": Update({"w": np.uint32([[0, 1], [2**31, 2**32 - 1]])}, 1.0),
        "ring64": Update({"w": np.uint64([0, 1, 2**63, 2**64 - 1])}, 1.0),
    }[name]
    assert same(decode(data, replace(expect, schema=Schema.of(tensors.tensors)))[1], tensors)


def test_messages_of_version_2_can_be_read_for_ever() -> None:
    from tests.regen import golden

    data = bytes.fromhex((GOLDEN / "message-v2-levels.hex").read_text())
    schema = Schema.of(golden.steep().tensors)
    expect = Expect("golden", 7, 3, "train", "b" * 64, schema, frozenset({"levels"}))
    assert same(decode(data, expect)[1], golden.steep())
    refused(changed(data, version=1), expect, "W601")  # planes in a message that says it has none


def test_a_message_says_the_first_version_whose_readers_know_it() -> None:
    """Sites of different releases go on understanding each other for as long as they can."""
    from tests.regen import golden

    flat = replace(PACKED, tensors={"w": np.int8([[1, 0], [-1, 1]])})
    messages = {"values": UPDATE, "flat": flat, "steep": golden.steep()}
    versions = {name: opened(encode(update, HEADER))[0].version for name, update in messages.items()}
    assert versions == {"values": 1, "flat": 1, "steep": 2}


def test_fields_of_later_versions_are_ignored() -> None:
    body = encode(UPDATE, HEADER)[: -len(SEAL) - 32] + b"\xaa\x06\x03new"  # field 101
    assert same(decode(body + SEAL + hashlib.sha256(body).digest(), EXPECT)[1], UPDATE)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"version": 3}, "W602"),
        ({"version": 0}, "W602"),
        ({"run": "other"}, "W604"),
        ({"round": 2}, "W604"),
        ({"client": 1}, "W604"),
        ({"verb": "probe"}, "W604"),
        ({"base": "other"}, "W604"),
        ({"schema": b"\0" * 32}, "W603"),
        ({"schema": b""}, "W603"),
        ({"entries": [pb.Entry(name="w", shape=[3])]}, "W603"),
        ({"kind": 0}, "W603"),
        ({"kind": 2}, "W603"),
        ({"kind": 99}, "W603"),
        ({"weight": float("nan")}, "W607"),
        ({"weight": float("inf")}, "W607"),
        ({"weight": 0.0}, "W607"),
        ({"weight": -1.0}, "W607"),
        ({"weight": 1e12}, "W606"),
        ({"metrics": [pb.Metric(name="loss", value=float("nan"))]}, "W607"),
        ({"metrics": [pb.Metric(name="b"), pb.Metric(name="a")]}, "W601"),
        ({"metrics": [pb.Metric(name="a"), pb.Metric(name="a")]}, "W601"),
        ({"metrics": [pb.Metric(name=f"{i:03}") for i in range(65)]}, "W606"),
        ({"metrics": [pb.Metric(name="x" * 65)]}, "W601"),
        ({"metrics": [pb.Metric(name="x" * 2000)]}, "W606"),
        ({"payload": b"\0" * 20}, "W601"),
        ({"payload": b"\0" * 28}, "W601"),
        ({"payload": b""}, "W601"),
        ({"payload": b"\0" * 200_000}, "W606"),
        ({"payload": np.float32([1, 2, 3, 4, 5, np.nan]).tobytes()}, "W607"),
        ({"payload": np.float32([1, 2, 3, 4, 5, -np.inf]).tobytes()}, "W607"),
        ({"payload": np.float32([1, 2, 3, 4, 5, 1e30]).tobytes()}, "W606"),
        ({"scales": b"\0\0"}, "W601"),
        ({"dtypes": b"\1"}, "W601"),
        ({"exponent": 3}, "W601"),
    ],
)
def test_a_dishonest_client_is_refused(fields: dict[str, object], code: str) -> None:
    refused(changed(encode(UPDATE, HEADER), **fields), replace(EXPECT, max_norm=1e6), code)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"scaling": 0}, "W601"),
        ({"scaling": 3}, "W601"),
        ({"scaling": 9}, "W601"),
        ({"scales": b""}, "W601"),
        ({"scales": b"\0\0\0"}, "W601"),
        ({"scales": np.float16([np.inf]).tobytes()}, "W607"),
        ({"scales": np.float16([np.nan]).tobytes()}, "W607"),
        ({"scales": np.float16([-1]).tobytes()}, "W607"),
        ({"exponent": 114}, "W607"),
        ({"exponent": -126}, "W607"),
        ({"exponent": 100}, "W606"),
        ({"payload": b"\0"}, "W601"),
    ],
)
def test_dishonest_levels_are_refused(fields: dict[str, object], code: str) -> None:
    refused(changed(encode(PACKED, HEADER), **fields), replace(PACKED_EXPECT, max_scale=1e6), code)


def test_the_norm_of_levels_is_bounded() -> None:
    norm = 0.5 * np.sqrt(1 + 1 + 9)
    decode(encode(PACKED, HEADER), replace(PACKED_EXPECT, max_norm=norm * 1.001))
    refused(encode(PACKED, HEADER), replace(PACKED_EXPECT, max_norm=norm * 0.999), "W606")


def test_names_are_bounded_where_they_travel() -> None:
    free = replace(EXPECT, schema=None, max_values=100)
    for shape in ([2**63], [11, 10], [1] * 9):
        data = changed(
            named(encode(UPDATE, HEADER), Schema.of(UPDATE.tensors)),
            entries=[pb.Entry(name="w", shape=shape)],
        )
        refused(data, free, "W606")
    refused(changed(encode(UPDATE, HEADER), entries=[pb.Entry(name="b"), pb.Entry(name="a")]), free, "W601")
    assert same(decode(named(encode(UPDATE, HEADER), Schema.of(UPDATE.tensors)), free)[1], UPDATE)


def test_a_state_is_no_answer() -> None:
    state = encode_state(VALUES, HEADER)
    both = replace(EXPECT, kinds=frozenset({"values", "state"}))
    refused(state, EXPECT, "W603")
    refused(state, both, "W603")
    with pytest.raises(Refused, match="W603"):
        decode_state(encode(UPDATE, HEADER), both)
    with pytest.raises(Refused, match="W603"):
        decode_state(changed(state, dtypes=b"\1\1\x63"), both)


def test_every_cut_and_every_extra_byte_is_seen() -> None:
    data = encode(UPDATE, HEADER)
    for end in range(len(data)):
        refused(data[:end], EXPECT, "W601")
    refused(data + b"\0", EXPECT, "W601")
    refused(data + data, EXPECT, "W601")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_client_cannot_send_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ClientFailed, match="W607"):
        encode(Update({"w": np.array([bad])}, 1.0), HEADER)
    if bad < 1e299:
        return
    with pytest.raises(FedtuneError, match="W607"):
        encode_state({"w": np.array([np.inf])}, HEADER)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_client_cannot_send_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(ClientFailed, match="W607"):
        encode(Update({"w": np.ones(1)}, weight), HEADER)


def test_other_types_are_the_callers_mistake() -> None:
    with pytest.raises(TypeError, match="int16"):
        encode(Update({"w": np.ones(1, np.int16)}), HEADER)
    with pytest.raises(ValueError, match="rounded"):
        encode(replace(PACKED, scales={"w": np.float32(1 / 3)}), HEADER)
    with pytest.raises(ValueError, match="shape"):
        encode(replace(PACKED, scales={"w": np.ones(2, np.float32)}), HEADER)
