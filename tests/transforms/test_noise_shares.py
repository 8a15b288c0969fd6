"""Noise in shares: a sum has all of it, no answer has, and nothing is said that the bound does not hold for."""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from fedtune import config
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.privacy.accountant import spent
from fedtune.privacy.masks.client import LEAST, least
from fedtune.privacy.releases import Release
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.schema import Schema
from fedtune.transforms.noise_shares import FINEST, NoiseShares, scale_of
from fedtune.transforms.registry import build
from fedtune.transforms.ring import FIGURES
from fedtune.types import Client, Round, Update
from tests import small
from tests.marks import mostly_thorough
from tests.runtime.test_masked import losing

CLIP = 0.5
SHARES = {"step": "private", "place": "shares", "clip": CLIP, "noise_multiplier": 2.0}
MASKED = [SHARES, {"step": "mask"}]
FIVE: dict[str, Any] = {"method__weight": "equal", "partition__clients": 5, "rounds": 1}


def answers(step: NoiseShares, values: list[np.ndarray], members: int) -> list[Update]:
    now = Round(1, 0, tuple(range(members)))
    return [
        step.on_client(Update.of({"w": value}, 7.0), Client(n, f"site-{n}", None, None), now)
        for n, value in enumerate(values)
    ]


def summed(step: NoiseShares, values: list[np.ndarray], members: int) -> Update:
    said = answers(step, values, members)
    return step.on_sum(reduce(Update.__add__, said), Round(1, 0, tuple(range(members))))


@pytest.mark.parametrize("members", [3, 10, 500])
def test_without_noise_a_sum_is_that_of_the_shortened_answers(members: int) -> None:
    draw = np.random.default_rng(members)
    values = [draw.normal(0, size, (3, 5)) for size in draw.uniform(1e-3, 1, members)]
    got = summed(NoiseShares(CLIP, 0.0, 0.4), values, members)
    want = sum(value * min(1.0, CLIP / float(np.linalg.norm(value))) for value in values)
    assert np.abs(got.tensors["w"] - want).max() <= members / scale_of(CLIP, 0.0, 0.4, members)[0]
    assert got.weight == members and not got.metrics


@pytest.mark.parametrize("answering", [4, 10])
def test_a_sum_has_the_noise_that_is_promised_and_more_where_more_answer(answering: int) -> None:
    """Of ten members, four make all of it."""
    step = NoiseShares(CLIP, 2.0, 0.4)
    noise = summed(step, [np.zeros(20_000)] * answering, 10).tensors["w"]
    sigma = CLIP * 2.0 * math.sqrt(answering / 4)
    assert kstest(noise / sigma, "norm").pvalue > 1e-4
    assert np.std(noise) == pytest.approx(sigma, rel=6 / math.sqrt(2 * noise.size))
    again = summed(step, [np.zeros(20_000)] * answering, 10).tensors["w"]
    assert abs(np.corrcoef(noise, again)[0, 1]) < 0.05


@pytest.mark.parametrize("members", [3, 10, 1000])
def test_no_answer_is_longer_than_the_bound_once_it_is_whole_numbers(members: int) -> None:
    draw = np.random.default_rng(members)
    for size in (1e-7, 1e-3, 1.0, 1e6):
        (said,) = answers(NoiseShares(CLIP, 0.0, 0.4), [draw.normal(0, size, 4096)], members)
        levels = said.tensors["w"].view(np.int32).astype(np.float64)
        assert np.linalg.norm(levels) <= scale_of(CLIP, 0.0, 0.4, members)[0] * CLIP * (1 + 1e-12)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("members", [3, 10, 300])
def test_the_longest_answers_of_all_with_noise_fit_into_the_ring(members: int, sign: float) -> None:
    got = summed(NoiseShares(CLIP, 2.0, 0.4), [np.array([sign * 9.0, 0.0])] * members, members)
    most = 12 * CLIP * 2.0 * math.sqrt(members / math.ceil(0.4 * members))
    assert abs(got.tensors["w"][0] - sign * members * CLIP) < most


@pytest.mark.parametrize("threshold", [0.55, 2 / 3, 0.9, 1.0])
def test_every_sum_that_a_mask_opens_has_answers_enough(threshold: float) -> None:
    for members in range(LEAST, 400):
        came = max(LEAST, least(members, threshold))  # of the keys; and of these, so many must answer
        for honest in (threshold**2, threshold**2 / 2, 0.01):
            assert least(came, threshold) >= math.ceil(honest * members - 1e-9)


def test_shares_too_coarse_for_the_ring_are_refused() -> None:
    step = NoiseShares(CLIP, CLIP * 1e-3, 0.4)
    with pytest.raises(ClientFailed, match="W607"):
        answers(step, [np.zeros(3)], 1000)
    assert np.prod(scale_of(CLIP, 2.0 * CLIP, 0.4, 1000)) > FINEST


def test_what_is_sent_is_ring_numbers_of_the_declared_shapes() -> None:
    chain = build(config.parse(tree_of(Path("model"), Path("rows.csv"))).chain)
    assert chain.adds and chain.hides == "mask" and [step.name for step in chain.steps] == ["private", "mask"]
    (said,) = answers(NoiseShares(CLIP, 1.0, 0.4), [np.zeros((2, 3))], 3)
    assert Schema.of(said.tensors) == NoiseShares(CLIP, 1.0, 0.4).sent(Schema((("w", (2, 3)),)))
    assert said.tensors["w"].dtype == said.tensors[FIGURES].dtype == np.uint32


def tree_of(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return small.tree(model, data, **({**FIVE, "chain": MASKED} | changes))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"chain": [SHARES]}, "without step = 'mask'"),
        ({"chain": [SHARES, {"step": "ring"}, {"step": "mask"}]}, "with step = 'ring'"),
        ({"chain": [SHARES | {"honest": 0.5}, {"step": "mask"}]}, "honest = 0.5 with threshold"),
        ({"chain": [SHARES | {"clip": 0.0, "noise_multiplier": 0.0}, {"step": "mask"}]}, "with clip = 0"),
        ({"chain": [SHARES | {"place": "client", "honest": 0.3}]}, "honest"),
        ({"method__weight": "rows"}, "method.weight = 'rows'"),
        ({"method__type": "experts", "method__experts": {"by": "clusters"}}, "sums of all members|experts"),
    ],
)
def test_what_the_bound_would_not_hold_for_is_refused(
    changes: dict[str, Any], found: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=found):
        config.parse(tree_of(tiny_bert, data, **changes))


def end(model: Path, data: Path, root: Path, chain: list[Any], lost: Any = None) -> tuple[np.ndarray, Any]:
    recipe = small.recipe(model, data, **{**FIVE, "chain": chain})
    folder, result, _ = small.play(recipe, root, carry=losing(lost or {}))
    shared = load_state(folder, 1, "")[0].shared
    return np.concatenate([shared[name].reshape(-1) for name in sorted(shared)]).astype(np.float64), result


@pytest.mark.parametrize("lost", mostly_thorough([{}, {"train": {2}}], [{}]))
def test_a_masked_run_has_the_noise_and_its_epsilon(
    lost: dict[str, set[int]], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Of five members two make all of the noise; five, or the four that are left, make more."""
    mute = [SHARES | {"noise_multiplier": 0.0}, {"step": "mask"}]
    plain, _ = end(tiny_bert, data, tmp_path / "plain", mute, lost)
    noisy, result = end(tiny_bert, data, tmp_path / "noisy", MASKED, lost)
    left = 5 - len(lost)
    sigma = CLIP * 2.0 * math.sqrt(left / 2) / left
    assert np.std(noisy - plain) == pytest.approx(sigma, rel=6 / math.sqrt(2 * plain.size))
    assert result["epsilon"] == spent([Release("gaussian", "client", 2.0)], 1e-5).epsilon
    clipped, _ = end(
        tiny_bert,
        data,
        tmp_path / "clipped",
        [{**SHARES, "place": "coordinator", "noise_multiplier": 0.0}],
        lost,
    )
    assert np.abs(plain - clipped).max() < 1e-6


def test_check_says_who_adds_what(tiny_bert: Path, data: Path) -> None:
    said = "\n".join(rows(check(config.parse(tree_of(tiny_bert, data)))))
    assert "a share of noise on every number, of which a sum has 1 or more" in said
    assert "epsilon" in said
