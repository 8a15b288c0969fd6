"""Ranks by need: each expert's rank by how many directions its group's first sum has, of as many in all as
equal ranks would take (the question of FlexMoRE: does every expert need the same rank?).

>>> allotted({"a": 1.0, "b": 3.0}, 4)
{'a': 2, 'b': 6}
>>> allotted({"a": 2.5, "b": 2.5}, 4)
{'a': 4, 'b': 4}
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.aggregate import Pair, for_rank, split
from fedtune.aggregate.product import spectrum
from fedtune.aggregate.resize import first_slices
from fedtune.types import Tensors

MOST = 2  # times the rank of [method.adapter] that one expert can have


def need(tensors: Tensors) -> float:
    """The effective rank of an expert's products (Roy and Vetterli 2007): exp of the entropy of the squared
    singular values' shares, the mean over layers; 1 where nothing has moved."""
    return float(np.mean([effective_rank(pair) for pair in split(tensors)[0].values()]))


def effective_rank(pair: Pair) -> float:
    sizes = spectrum(pair).S
    if not sizes.size:
        return 1.0
    energy = np.square(sizes) / np.square(sizes).sum()
    return float(np.exp(-(energy * np.log(np.maximum(energy, 1e-300))).sum()))


def allotted(needs: Mapping[str, float], each: int) -> dict[str, int]:
    """Ranks of 1 to MOST * each, which add up to `each` for every expert, in proportion to needs: one after
    the other goes to whom it is owed most (Webster's divisors); of equals, to the first by id."""
    ranks = dict.fromkeys(sorted(needs), 1)
    for _ in range(len(ranks) * (each - 1)):
        open_ = [name for name, rank in ranks.items() if rank < MOST * each]
        ranks[max(open_, key=lambda name: needs[name] / (ranks[name] + 0.5))] += 1
    return ranks


def at_rank(tensors: Tensors, rank: int) -> dict[str, np.ndarray]:
    """The expert at another rank: the best approximation of its products, or more directions to train in,
    whose products are zero; at its own rank the very tensors."""
    have = next(pair.rank for pair in split(tensors)[0].values())
    if have == rank:
        return dict(tensors)
    return (for_rank if rank < have else first_slices)(tensors, 1.0, rank, 1.0)
