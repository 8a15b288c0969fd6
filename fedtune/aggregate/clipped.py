"""Norm clipping: no answer may move the adapter further than a bound (Sun et al. 2019, "Can You Really
Backdoor Federated Learning?").

A move is the change of products and plain tensors from the state before; longer ones are shortened to the
bound, then all are
averaged equally as products and cut to rank by SVD: a client could claim any weight. bound = 0 takes the
median of this round's norms. For a client of
smaller rank, what its truncation left out counts as move.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.aggregate.pairs import Pair, join, split
from fedtune.aggregate.product import ProductSum, balanced, beyond, ratio, spectrum
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.aggregate.single_answers import HeldAdapter, hold, move, scaled
from fedtune.aggregate.weighted_mean import WeightedMean
from fedtune.types import Round


class Clipped(Rule):
    """rule = "clipped": no answer may move the adapter further than a bound."""

    rule: Literal["clipped"] = "clipped"
    linear: ClassVar[bool] = False
    mixed: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    bound: float = Field(0.0, ge=0)
    """Largest norm of an answer's move; 0 means the median of the round's norms."""

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        """report: clipped (share of answers), bound, cut (relative loss of the SVD, over all modules);
        layers: the same by module."""
        pairs, start = split(before.tensors)
        held = hold(answers, before)
        norms = np.array([move(h, pairs, start, scale) for h in held])
        limit = self.bound or float(np.median(norms))
        shares = np.minimum(1.0, np.divide(limit, norms, out=np.ones_like(norms), where=norms > 0))
        made, layers, lost, whole = dict[str, Pair](), dict[str, float](), 0.0, 0.0
        for name, pair in pairs.items():
            of = spectrum(shortened(held, shares, name, scaled(pair, scale)))
            made[name] = balanced(of, pair.rank, scale, name, pair.A)
            layers[name] = ratio(beyond(of, pair.rank), float(np.linalg.norm(of.S)))
            lost, whole = lost + beyond(of, pair.rank) ** 2, whole + float(of.S @ of.S)
        rest = WeightedMean()
        for h, share in zip(held, shares, strict=True):
            rest.add(
                {
                    name: start[name] + share * (np.asarray(value, dtype=np.float64) - start[name])
                    for name, value in h.rest.items()
                },
                1.0,
            )
        report = {
            "clipped": float(np.mean(shares < 1)),
            "bound": limit,
            "cut": ratio(float(np.sqrt(lost)), float(np.sqrt(whole))),
        }
        return Combined(join(made, rest.mean()), report=report, layers=layers)


def shortened(held: list[HeldAdapter], shares: np.ndarray, name: str, origin: Pair) -> Pair:
    """origin + mean of share_i (answer_i - origin), as stacked factors."""
    weights = [float(share) / len(held) for share in shares]
    product = ProductSum()
    for h, weight in zip(held, weights, strict=True):
        product.add(h.pair(name), weight)
    product.add(origin, 1 - sum(weights))
    return product.stacked()
