"""Ranks by need: how they are shared out, and an expert at another rank."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate import Pair
from fedtune.experts.need import MOST, allotted, at_rank, effective_rank, need
from fedtune.rng import stream


def expert(rank: int, number: int = 1) -> dict[str, np.ndarray]:
    draw = stream("need expert", number)
    return {
        f"{layer}.lora_{side}.weight": draw.normal(size=shape).astype(np.float32)
        for layer in ("p", "q")
        for side, shape in (("A", (rank, 7)), ("B", (9, rank)))
    }


def product(tensors: dict[str, np.ndarray], layer: str) -> np.ndarray:
    made: np.ndarray = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    return made


@pytest.mark.parametrize("each", [1, 2, 5, 16])
def test_ranks_add_up_to_those_of_equals_and_follow_needs(each: int) -> None:
    draw = stream("needs", each)
    for count in range(1, 7):
        needs = {f"e{n}": float(value) for n, value in enumerate(draw.uniform(1, 8, count))}
        ranks = allotted(needs, each)
        assert sum(ranks.values()) == each * count and set(ranks) == set(needs)
        assert all(1 <= rank <= MOST * each for rank in ranks.values())
        order = sorted(needs, key=lambda name: needs[name])
        assert [ranks[name] for name in order] == sorted(ranks.values())
        assert allotted(dict(reversed(needs.items())), each) == ranks
        assert allotted(dict.fromkeys(needs, 3.3), each) == dict.fromkeys(needs, each)


def test_the_effective_rank_counts_directions_of_one_strength() -> None:
    q = np.linalg.qr(stream("directions", 1).normal(size=(9, 9)))[0]
    for count in (1, 2, 4):
        assert effective_rank(Pair(q[:, :4] * (np.arange(4) < count), q[:4])) == pytest.approx(count)
    assert effective_rank(Pair(np.zeros((9, 3)), np.ones((3, 7)))) == 1
    assert 1 < need(expert(4)) < 4


def test_an_expert_at_another_rank_is_the_nearest_or_the_same() -> None:
    made = expert(4)
    assert all(at_rank(made, 4)[name] is value for name, value in made.items())
    for layer in ("p", "q"):
        more, fewer = at_rank(made, 6), at_rank(made, 2)
        np.testing.assert_array_equal(more[f"{layer}.lora_A.weight"][:4], made[f"{layer}.lora_A.weight"])
        np.testing.assert_allclose(product(more, layer), product(made, layer), rtol=1e-5, atol=1e-6)
        assert not more[f"{layer}.lora_B.weight"][:, 4:].any()
        assert (more[f"{layer}.lora_A.weight"][4:] != 0).all()  # or nothing could be learned there
        u, s, vt = np.linalg.svd(product(made, layer).astype(np.float64))
        want = (u[:, :2] * s[:2]) @ vt[:2]
        np.testing.assert_allclose(product(fewer, layer), want, rtol=1e-4, atol=1e-5)
        assert fewer[f"{layer}.lora_A.weight"].shape == (2, 7)
