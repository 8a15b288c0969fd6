"""10**5 messages that nobody should have sent: every one is refused with a code or is what was asked for,
within the memory declared."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import Refused
from fedtune.schema import Schema
from fedtune.types import Update
from fedtune.wire import Expect, decode, encode
from fedtune.wire.scales import rounded
from fedtune.wire.v1 import message_pb2 as pb
from tests.waiting import PATIENCE
from tests.wire.fuzz import CORPUS, HEADER, TAIL, judge, mutated, reseal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [10_000, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dishonest", [False, True], ids=["damaged", "dishonest"])
def test_thousands_of_mutations(dishonest: bool, count: int) -> None:
    rng, taken, originals = random.Random(dishonest), 0, {data for data, _ in CORPUS}
    bound = min(expect.bound for _, expect in CORPUS)
    peak = 0
    for turn in range(count):
        if traced := turn // len(CORPUS) % 5 == 0:  # tracing takes several times as long as what is traced
            tracemalloc.start()
        data, expect = CORPUS[turn % len(CORPUS)]
        other = CORPUS[rng.randrange(len(CORPUS))][0]
        altered = reseal(mutated(rng, data[:-TAIL], other)) if dishonest else mutated(rng, data, other)
        if judge(altered, expect):
            taken += 1
            assert dishonest or altered in originals  # no altered payload is ever taken for a whole one
        if traced:
            peak = max(peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peak < 2 * bound
    assert not dishonest or taken > count // 500  # the mutations reach what lies behind the digest


@given(st.binary(max_size=300), st.integers(0, len(CORPUS) - 1), st.booleans())
@settings(max_examples=500)
def test_any_bytes(data: bytes, which: int, right: bool) -> None:
    judge(reseal(data) if right else data, CORPUS[which][1])


@given(st.data())
@settings(max_examples=300)
def test_any_fields(data: st.DataObject) -> None:
    original, expect = CORPUS[data.draw(st.integers(0, len(CORPUS) - 1))]
    message = pb.Message.FromString(original)
    message.ClearField("digest")
    for name in data.draw(
        st.lists(
            st.sampled_from(["payload", "scales", "dtypes", "kind", "scaling", "exponent", "weight"]),
            max_size=3,
        )
    ):
        kind = type(getattr(message, name))
        drawn = {
            bytes: st.binary(max_size=200),
            int: st.integers(0, 2**31 - 1) if name != "exponent" else st.integers(-(2**31), 2**31 - 1),
            float: st.floats(),
        }[kind]
        setattr(message, name, data.draw(drawn))
    judge(reseal(message.SerializeToString(deterministic=True)), expect)


@pytest.mark.parametrize("kind", ["values", "ring", "sparse", "half", "dense", "planes", "kept"])
def test_memory_stays_within_twice_the_bound(kind: str) -> None:
    rng, count = np.random.default_rng(0), 400_000
    if kind in ("values", "ring"):
        update = (
            Update.of({"w": rng.normal(size=count).astype(np.float32)})
            if kind == "values"
            else Update({"w": rng.integers(0, 2**32, count, np.uint32)})
        )
    else:
        top, share = {"sparse": (1, 0.05), "half": (1, 0.5), "dense": (7, 0.9), "kept": (1, 0.2)}.get(
            kind, (2, 0.4)
        )
        levels = (
            rng.integers(1, top + 1, count) * rng.choice([-1, 1], count) * (rng.random(count) < share)
        ).astype(np.int8)
        update = Update(
            {"w": levels},
            1.0,
            {},
            rounded({"w": np.ones((np.count_nonzero(levels), 1)) if kind == "kept" else 1.0}),
        )
    data = encode(update, HEADER)
    expect = Expect(
        "run",
        3,
        2,
        "train",
        "base",
        Schema.of(update.tensors),
        frozenset({kind if kind in ("values", "ring") else "levels"}),
        max_norm=1e9,
    )
    assert len(data) <= expect.max_message
    del update
    tracemalloc.start()
    taken = decode(data, expect)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken and peak < 2 * expect.bound


def test_a_flood_of_small_parts_is_refused_before_it_is_parsed() -> None:
    """Two bytes of message would become an object each."""
    data, expect = CORPUS[0]
    flood = reseal(data[:-TAIL] + b"\x52\x00" * 30_000)
    assert len(flood) <= expect.max_message
    with pytest.raises(Refused, match="W606"):
        decode(flood, expect)


def test_too_long_is_refused_unread() -> None:
    data, expect = CORPUS[0]
    with pytest.raises(Refused, match="W606"):
        decode(bytes(10_000_000), replace(expect))
    assert judge(data, expect)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris(tmp_path: Path) -> None:
    for number, (data, _) in enumerate(CORPUS):
        (tmp_path / str(number)).write_bytes(data[:-TAIL])
    command = [
        sys.executable,
        "-m",
        "tests.wire.coverage_fuzz",
        "-runs=5000",
        "-max_len=400",
        "-seed=1",
        "-max_total_time=20",
        f"-artifact_prefix={tmp_path}/",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
