"""HetLoRA: slices of the factors are averaged by index, a client takes the first ones (Cho et al. 2024,
arXiv:2401.06432).

Up: a client's pairs at its own rank. `by = "slices"` weighs each slice by the clients that have it (raFLoRA,
arXiv:2602.13486);
`by = "padding"` counts the others as zeros, which thins out high ranks: known to be bad, kept to be compared
with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np

from fedtune.aggregate.gather import Ledger, Module, alive, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.resize import first_slices
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.types import Round, Tensors


class HetLoRA(Rule):
    """rule = "hetlora": slices of the factors are averaged by index."""

    rule: Literal["hetlora"] = "hetlora"
    linear: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    mixed: ClassVar[bool] = True
    by: Literal["slices", "padding"] = "slices"
    """A slice of rank is averaged over the clients that have it, or over all with zeros for the others (which
    dilutes high ranks)."""

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        made = gather(answers, before, scale)
        ledger, pairs = Ledger(scale), dict[str, Pair]()
        for module in made.modules():
            pairs[module.name] = alive(module) if self.by == "padding" else by_slice(module)
            ledger.note(module, made=pairs[module.name])
        return finished(made, pairs, ledger)

    def for_rank(
        self, tensors: Tensors, scale: float, rank: int, client_scale: float
    ) -> dict[str, np.ndarray]:
        return first_slices(tensors, scale, rank, client_scale)


def by_slice(module: Module) -> Pair:
    """Each slice over the share that has it; a slice that nobody had this round stays as it was."""
    had = module.share > 0
    share = np.where(had, module.share, 1.0)
    return Pair(
        np.where(had, module.mean.B / share, module.before.B),
        np.where(had[:, None], module.mean.A / share[:, None], module.before.A),
    )
