"""FLoRA: all clients' adapters are stacked, which is exact, and training starts afresh (Wang et al. 2024,
arXiv:2409.05976).

Up: a client's pairs at its own rank. The paper adds the stack to the base; here it is the residual, compacted
to its numerical
rank, so that the base stays untouched. The fresh pair has a random A, equal on all clients, and B = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.aggregate.gather import Ledger, Module, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.residual import compact, summary
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.rng import stream
from fedtune.types import Round


class FLoRA(Rule):
    """rule = "flora": all adapters are stacked, which is exact, and training starts afresh."""

    rule: Literal["flora"] = "flora"
    linear: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    mixed: ClassVar[bool] = True
    carries: ClassVar[bool] = True
    extra: int = Field(32, ge=1)
    """Rank that carries what the base model would be changed by; what does not fit is cut, and the loss is
    logged."""

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        made = gather(answers, before, scale, slices=False)
        ledger, pairs, residual = Ledger(scale), dict[str, Pair](), dict[str, Pair]()
        for module in made.modules():
            old = before.residual.get(module.name)
            residual[module.name], lost = compact([module.product] + ([old] if old else []), self.extra)
            ledger.note(module, error=lost)
            pairs[module.name] = fresh(module, now)
        return finished(made, pairs, ledger, residual, summary(residual))


def fresh(module: Module, now: Round) -> Pair:
    """Another A in every round, as in the paper; +-1/sqrt(k), as peft starts LoRA."""
    rank, k = module.before.A.shape
    bound = 1 / math.sqrt(k)
    drawn = stream(f"flora A {module.name}", now.seed, now.number).uniform(-bound, bound, (rank, k))
    return Pair(np.zeros(module.before.B.shape), drawn)
