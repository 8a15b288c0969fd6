"""Answers in whole numbers: what arrives is the mean times the weight, exactly; what is outside its declared
bounds is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.errors import Refused
from fedtune.schema import Schema
from fedtune.types import Update
from fedtune.wire import Expect, Header, decode, encode

SCHEMA = Schema((("a", (2, 2)), ("steps", (3,))), (("a", "int32", 1 << 26), ("steps", "int16", 25600)))
HEADER = Header("run", 1, 3, "train", "base", SCHEMA.fingerprint, whole=SCHEMA.whole)
EXPECT = Expect("run", 1, 3, "train", "base", SCHEMA, frozenset({"whole"}))
MEANS = {"a": np.int64([[1, -2], [1 << 26, 0]]), "steps": np.int64([25600, -25600, 7])}


def update(weight: int = 7) -> Update:
    return Update({name: value * weight for name, value in MEANS.items()}, float(weight), {"loss": 2.0})


def test_whole_numbers_arrive_exactly_and_cost_what_their_types_say() -> None:
    data = encode(update(), HEADER)
    got = decode(data, EXPECT)[1]
    assert got.weight == 7 and got.metrics == {"loss": 2.0}
    for name, value in MEANS.items():
        assert got.tensors[name].dtype == np.int64
        np.testing.assert_array_equal(got.tensors[name], 7 * value)
    wider = Schema(SCHEMA.entries, (("a", "int32", 1 << 26), ("steps", "int32", 25600)))
    longer = encode(update(), Header("run", 1, 3, "train", "base", wider.fingerprint, whole=wider.whole))
    assert len(longer) - len(data) == 3 * 2


def test_each_of_many_tensors_is_read_from_its_own_place() -> None:
    means = {name: np.int64([number, -number, 3]) for number, name in enumerate("abcd", 1)}
    types = ("int16", "int32", "int16", "int32")
    schema = Schema(
        tuple((name, (3,)) for name in means), tuple((*one, 99) for one in zip(means, types, strict=True))
    )
    header = Header("run", 1, 3, "train", "base", schema.fingerprint, whole=schema.whole)
    data = encode(Update({name: 2 * value for name, value in means.items()}, 2.0), header)
    got = decode(data, Expect("run", 1, 3, "train", "base", schema, frozenset({"whole"})))[1]
    assert {name: value.tolist() for name, value in got.tensors.items()} == {
        name: (2 * value).tolist() for name, value in means.items()
    }


def test_what_is_not_whole_or_too_large_is_the_methods_mistake() -> None:
    with pytest.raises(ValueError, match="times whole numbers"):
        encode(Update({**update().tensors, "steps": np.int64([1, 0, 0])}, 7.0), HEADER)
    with pytest.raises(ValueError, match="within 25600"):
        encode(Update({**update(1).tensors, "steps": np.int64([25601, 0, 0])}, 1.0), HEADER)
    with pytest.raises(ValueError, match="whole weight"):
        encode(Update(update().tensors, 7.5), HEADER)


@pytest.mark.parametrize(
    ("schema", "weight", "code"),
    [
        (
            Schema(SCHEMA.entries, (("a", "int32", 1 << 26), ("steps", "int16", 25599))),
            7.0,
            "W603",
        ),  # another bound: another schema
        (SCHEMA, 2.0**28, "W606"),
        (SCHEMA, 0.5, "W606"),
    ],
)
def test_a_sender_that_means_other_bounds_or_weights_is_refused(
    schema: Schema, weight: float, code: str
) -> None:
    header = Header("run", 1, 3, "train", "base", schema.fingerprint, whole=schema.whole)
    values = {name: np.zeros_like(value) for name, value in MEANS.items()}
    data = encode(Update(values, max(weight, 1.0)), header)
    if weight < 1:
        data = reweighted(data, weight)
    with pytest.raises(Refused, match=code):
        decode(data, EXPECT)


def test_a_number_beyond_its_bound_is_refused_whoever_encoded_it() -> None:
    liar = Schema(SCHEMA.entries, (("a", "int32", 1 << 30), ("steps", "int16", 32000)))
    values = {"a": MEANS["a"], "steps": np.int64([26000, 0, 0])}
    data = encode(
        Update(values, 1.0), Header("run", 1, 3, "train", "base", SCHEMA.fingerprint, whole=liar.whole)
    )
    with pytest.raises(Refused, match=r"W607: found 26000 in 'steps', expected whole numbers within 25600"):
        decode(data, EXPECT)
    lowest = {"a": np.int64([[-(1 << 31), 0], [0, 0]]), "steps": MEANS["steps"]}
    widest = (("a", "int32", 1 << 31), ("steps", "int16", 25600))
    data = encode(Update(lowest, 1.0), Header("run", 1, 3, "train", "base", SCHEMA.fingerprint, whole=widest))
    with pytest.raises(Refused, match="W607"):
        decode(data, EXPECT)


def test_other_types_and_other_kinds_are_refused() -> None:
    other = encode(
        update(),
        Header(
            "run",
            1,
            3,
            "train",
            "base",
            SCHEMA.fingerprint,
            whole=(("a", "int32", 1 << 26), ("steps", "int32", 25600)),
        ),
    )
    with pytest.raises(Refused, match=r"W60[13]"):
        decode(other, EXPECT)
    with pytest.raises(Refused, match="W603"):
        decode(encode(update(), HEADER), Expect("run", 1, 3, "train", "base", SCHEMA, frozenset({"values"})))
    plain = Schema(SCHEMA.entries)
    floats = encode(
        Update.of({name: value.astype(np.float32) for name, value in MEANS.items()}),
        Header("run", 1, 3, "train", "base", plain.fingerprint),
    )
    with pytest.raises(Refused, match="W603"):
        decode(floats, EXPECT)


def reweighted(data: bytes, weight: float) -> bytes:
    """The same message with another weight, sealed again."""
    from fedtune.wire.frame import opened, sealed

    message, payload = opened(data)
    message.weight = weight
    return sealed(message, [bytes(payload)])
