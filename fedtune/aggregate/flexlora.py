"""FlexLoRA: the mean of products, cut to each rank by SVD (Bai et al. 2024, arXiv:2402.11505). Up: a client's
pairs at its own rank.

Eckart and Young: no adapter of the server's rank is nearer to mean(BA). Through the small core of `product`,
not a dense SVD.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np

from fedtune.aggregate.gather import Ledger, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.product import balanced, beyond, spectrum
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.types import Round


class FlexLoRA(Rule):
    """rule = "flexlora": the mean of products, cut to each rank by SVD."""

    rule: Literal["flexlora"] = "flexlora"
    linear: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    mixed: ClassVar[bool] = True

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        return mean_of_products(answers, before, scale)


def mean_of_products(answers: Iterable[ClientAdapter], before: Combined, scale: float) -> Combined:
    """The weighted mean of the clients' products, cut to the ranks of the state before by SVD."""
    made = gather(answers, before, scale, slices=False)
    ledger, pairs = Ledger(scale), dict[str, Pair]()
    for module in made.modules():
        of, rank = spectrum(module.product), module.before.rank
        pairs[module.name] = balanced(of, rank, scale, module.name, module.before.A)
        ledger.note(module, error=beyond(of, rank), whole=float(np.linalg.norm(of.S)))
    return finished(made, pairs, ledger)
