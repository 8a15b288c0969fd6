"""What the fuzzers throw and what must hold: shared by the loop, hypothesis and atheris."""

from __future__ import annotations

import hashlib
import random

import numpy as np

from fedtune.errors import Refused
from fedtune.schema import Schema
from fedtune.types import Update
from fedtune.wire import Expect, Header, decode, decode_state, encode, encode_changes, encode_state
from fedtune.wire.frame import SEAL
from fedtune.wire.scales import rounded
from fedtune.wire.v1 import message_pb2 as pb

HEADER = Header("run", 3, 2, "train", "base")
TENSORS = {"b": np.float32([[1.5, -2.0, 0.1]]), "a": np.arange(9, dtype=np.float32)}
TAIL = len(SEAL) + 32


def named(data: bytes, schema: Schema) -> bytes:
    """A message that names its tensors: receivers without a schema read it, and nothing of ours writes it."""
    message = pb.Message.FromString(data)
    message.ClearField("digest")
    message.entries.extend(pb.Entry(name=name, shape=shape) for name, shape in schema.entries)
    return reseal(message.SerializeToString(deterministic=True))


def packed(kind: str) -> Update:
    """Levels of every kind of scales and every road of the coder."""
    levels = {"a": np.zeros(70, np.int8), "b": np.int8([[1, -1], [1, 1]])}
    levels["a"][[3, 60]] = 1, -1
    if kind == "dense":
        levels["a"][:] = np.arange(70) % 9 - 4
    if kind == "planes":
        levels["a"][[9, 20, 61]] = 2, -7, 1
    sizes = {
        "tensor": lambda v: (),
        "planes": lambda v: (),
        "dense": lambda v: (-(-v.size // 64),),
        "kept": lambda v: (np.count_nonzero(v), 1),
    }
    return Update(
        levels, 2.0, {}, rounded({name: np.full(sizes[kind](value), 1e-3) for name, value in levels.items()})
    )


def corpus() -> list[tuple[bytes, Expect]]:
    """One message of each kind and what its receiver expects."""
    updates = [
        Update.of(TENSORS, 7.0, {"loss": 1.5}),
        Update({"w": np.uint32([1, 2**31])}, 1.0),
        packed("tensor"),
        packed("dense"),
        packed("kept"),
        packed("planes"),
    ]
    kinds = ["values", "ring", "levels", "levels", "levels", "levels"]
    out = [
        (
            encode(u, HEADER),
            Expect("run", 3, 2, "train", "base", Schema.of(u.tensors), frozenset({kind}), max_norm=1e6),
        )
        for u, kind in zip(updates, kinds, strict=True)
    ]
    state = {"w": TENSORS["a"], "n": np.int64([4])}
    out.append(
        (
            encode_state(state, HEADER),
            Expect("run", 3, 2, "train", "base", Schema.of(state), frozenset({"state"})),
        )
    )
    whole = {"a": np.arange(-9, 60, dtype=np.int32), "b": np.int64([2**40, 0])}
    changes = encode_changes(whole, {name: value != 0 for name, value in whole.items()}, HEADER)
    out.append(
        (changes, Expect("run", 3, 2, "train", "base", Schema.of(whole), frozenset({"state", "changes"})))
    )
    out.append(
        (
            named(encode(updates[0], HEADER), Schema.of(updates[0].tensors)),
            Expect("run", 3, 2, "train", "base", None, frozenset({"values"}), max_values=64),
        )
    )
    return out


def reseal(body: bytes) -> bytes:
    """A digest that is right: what only a dishonest sender can make."""
    return body + SEAL + hashlib.sha256(body).digest()


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bit flips, cuts, insertions, splices, and edits of what may be a length."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at, way = rng.randrange(len(out) + 1), rng.randrange(7)
        if way == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif way == 2:
            del out[at : at + rng.randrange(1, 9)]
        elif way == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif way == 4:
            del out[at:]
        elif way == 5:
            start = rng.randrange(len(other))
            out[at : at + rng.randrange(20)] = other[start : start + rng.randrange(1, 40)]
        else:
            out[at:at] = b"\xff" * rng.randrange(1, 9) + b"\x01"  # a huge number where one begins
    return bytes(out)


def judge(data: bytes, expect: Expect) -> bool:
    """Whether a message was taken. What is taken must be within what was asked; anything but a refusal is a
    failure."""
    try:
        if "state" in expect.kinds:
            _, state = decode_state(data, expect)
            assert Schema.of(state) == expect.schema and all(
                np.isfinite(value).all() for value in state.values()
            )
            return True
        header, update = decode(data, expect)
    except Refused as refusal:
        assert refusal.code in {f"W60{n}" for n in (1, 2, 3, 4, 6, 7)}
        assert len(str(refusal)) < 1000
        return False
    assert (header.run, header.round, header.client, header.verb, header.base) == (
        "run",
        3,
        2,
        "train",
        "base",
    )
    assert expect.schema is None or Schema.of(update.tensors) == expect.schema
    assert sum(value.size for value in update.tensors.values()) <= expect.count
    assert 0 < update.weight <= expect.max_weight and all(
        np.isfinite(number) for number in update.metrics.values()
    )
    assert all(np.isfinite(value).all() for value in (*update.tensors.values(), *update.scales.values()))
    return True


def one(data: bytes) -> None:
    """Atheris's entry: the bytes as they are, and with a digest that is right, for every receiver."""
    for _, expect in CORPUS:
        judge(data, expect)
        judge(reseal(data), expect)


CORPUS = corpus()
