"""Whole numbers modulo a power of two: sums that cannot overflow, within half a step of the numbers, with weights
and figures that only the sum shows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from fedtune.errors import ClientFailed, Refused
from fedtune.schema import Schema
from fedtune.transforms.base import Chain, Question
from fedtune.transforms.ring import CUT, FIGURES, Ring, RingSettings, from_limbs, limbs
from fedtune.types import Client, Round, Update
from fedtune.wire import Expect, Header, decode, encode

LOSS = Question("run", "train", figures=("loss", "start"))
WIDE = replace(LOSS, moves=False)


def site(number: int) -> Client:
    return Client(number, f"site-{number}", None, None)


def through(chain: Chain, updates: list[Update], now: Round) -> Update:
    """The sum of these answers as the server reads it, over the wire."""
    sent = []
    for number, update in enumerate(updates):
        said = chain.send(update, site(number), now)
        schema = Schema.of(said.tensors)
        data = encode(said, Header("run", 1, number, "train"))
        sent.append(decode(data, Expect("run", 1, number, "train", "", schema, chain.kinds))[1])
    return chain.settle(reduce(Update.__add__, sent), now)


def chain_of(question: Question, clip: float = 1.0, weight: int = 1 << 16) -> Chain:
    return Chain([RingSettings(clip=clip, weight=weight).build()]).bound(question)


@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_a_sum_is_within_half_a_step_a_member(count: int) -> None:
    draw = np.random.default_rng(count)
    values = [{"w": draw.normal(0, 0.2, (5, 3)), "b": np.asarray(draw.normal(0, 0.2))} for _ in range(count)]
    weights = draw.integers(1, 500, count).astype(float)
    updates = [Update.of(value, weight, {"loss": 0.5}) for value, weight in zip(values, weights, strict=True)]
    got = through(chain_of(LOSS), updates, Round(1, 0, tuple(range(count))))
    step = (1 << 16) / ((2**31 - 1) // count)
    for name in ("w", "b"):
        want = sum(value[name] * weight for value, weight in zip(values, weights, strict=True))
        assert np.abs(got.tensors[name] - want).max() <= count * step / 2
    assert got.weight == weights.sum() and got.metrics == {"loss": weights.sum() / 2, CUT: 0.0}
    assert got.tensors["b"].shape == () and got.tensors["w"].dtype == np.float64


@pytest.mark.parametrize("count", [3, 5, 1000, 4097])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_answers_of_all_members_do_not_overflow(count: int, sign: int) -> None:
    one = Update.of({"w": np.full(2, sign * 7.0)}, 1 << 16)
    chain, now = chain_of(LOSS, clip=7.0), Round(1, 0, tuple(range(count)))
    said = chain.send(one, site(0), now)
    total = Update({name: value * np.uint32(count) for name, value in said.tensors.items()}, count)
    got = chain.settle(total, now).values()["w"]
    np.testing.assert_allclose(got, sign * 7.0, rtol=1e-5)


def test_what_is_beyond_the_clip_is_cut_and_counted() -> None:
    values = {"w": np.float64([0.5, -3.0, 9.0, 0.25])}
    got = through(chain_of(LOSS, weight=4), [Update.of(values, 2.0)] * 3, Round(1, 0, (0, 1, 2)))
    np.testing.assert_allclose(got.mean().tensors["w"], [0.5, -1.0, 1.0, 0.25], atol=1e-8)
    assert got.mean().metrics == {CUT: 0.5}


def test_a_weight_beyond_the_most_counts_as_the_most() -> None:
    updates = [
        Update.of({"w": np.float64([0.5])}, 1000.0, {"loss": 2.0}),
        Update.of({"w": np.float64([-0.5])}, 5.0),
    ]
    got = through(chain_of(LOSS, weight=10), updates, Round(1, 0, (0, 1)))
    assert got.weight == 15.0 and got.metrics["loss"] == 20.0
    np.testing.assert_allclose(got.mean().tensors["w"], [2.5 / 15], atol=1e-8)


def test_whole_numbers_are_exact_at_any_weight() -> None:
    draw = np.random.default_rng(0)
    numbers = [draw.integers(-(1 << 50), 1 << 50, 40) for _ in range(5)]
    updates = [Update({"pool": value}, 3.0 + n, {"loss": -1.5}) for n, value in enumerate(numbers)]
    got = through(chain_of(replace(WIDE, whole=True)), updates, Round(1, 0, tuple(range(5))))
    np.testing.assert_array_equal(got.tensors["pool"], sum(numbers))
    assert got.tensors["pool"].dtype == np.int64 and got.weight == 25.0 and got.metrics == {"loss": -7.5}


def test_sums_that_are_no_differences_keep_their_digits() -> None:
    values = np.float64([1e-6, 1.0, 30_000.0, -0.3])
    got = through(chain_of(WIDE), [Update.of({"sums": values}, 500.0)] * 4, Round(1, 0, (0, 1, 2, 3)))
    np.testing.assert_allclose(got.mean().tensors["sums"], values, rtol=1e-4, atol=1e-10)
    assert got.metrics == {}  # nobody said a figure


def test_nothing_of_an_answer_is_outside_the_ring() -> None:
    update = Update.of({"w": np.float64([0.1])}, 12.0, {"loss": 3.0, "start": 4.0})
    for question in (LOSS, WIDE):
        sent = chain_of(question).send(update, site(0), Round(1, 0, (0, 1, 2)))
        assert (sent.weight, sent.metrics, sent.notes) == (1.0, {}, ())
        assert chain_of(question).sent(Schema.of(update.tensors)) == Schema.of(sent.tensors)
        assert {value.dtype for value in sent.tensors.values()} == {
            np.dtype("uint64" if question is WIDE else "uint32")
        }


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_numbers_that_do_not_fit_are_the_clients_failure(bad: float) -> None:
    now = Round(1, 0, (0, 1, 2))
    with pytest.raises(ClientFailed, match="W607"):
        chain_of(WIDE).send(Update({"w": np.float64([bad])}, 1.0), site(0), now)
    with pytest.raises(ClientFailed, match="weight or figure"):
        chain_of(LOSS).send(Update({"w": np.float64([0])}, 1.0, {"loss": bad}), site(0), now)


def test_a_sum_without_weight_is_refused() -> None:
    ring = Ring(1.0, 10, LOSS)
    total = Update(
        {"w": np.zeros(1, np.uint32), FIGURES: np.zeros(ring.sent(Schema(())).count, np.uint32)}, 3.0
    )
    with pytest.raises(Refused, match="weight 0"):
        ring.on_sum(total, Round(1, 0, (0, 1, 2)))


def test_limbs_add_without_a_carry_that_is_lost() -> None:
    draw = np.random.default_rng(1)
    numbers = [draw.integers(-(2**62), 2**62, 6).view(np.uint64) for _ in range(3)]
    total = reduce(np.add, [limbs(number) for number in numbers])
    np.testing.assert_array_equal(from_limbs(total), reduce(np.add, numbers))
    most = np.full(1, 2**64 - 1, np.uint64)
    assert limbs(most).max() * 65_536 < 2**32
