"""FedEx-LoRA: mean factors, and what they get wrong as a residual (Singhal et al. 2025, arXiv:2410.09432).
Up: both factors.

residual += sum p_i s_i B_i A_i - s (mean B)(mean A), of rank at most (clients + 1) r a round; exact unless
`extra` cuts it.
The paper adds it to the base; here it stands beside the adapter, compacted to its numerical rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from fedtune.aggregate.gather import Ledger, alive, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.residual import compact, summary
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.types import Round


class FedEx(Rule):
    """rule = "fedex": mean factors, and what they get wrong as a residual."""

    rule: Literal["fedex"] = "fedex"
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
        made = gather(answers, before, scale)
        ledger, pairs, residual = Ledger(scale), dict[str, Pair](), dict[str, Pair]()
        for module in made.modules():
            old = before.residual.get(module.name)
            minus = Pair(-scale * module.mean.B, module.mean.A)
            residual[module.name], lost = compact(
                [module.product, minus] + ([old] if old else []), self.extra
            )
            ledger.note(module, error=lost)
            pairs[module.name] = alive(module)
        return finished(made, pairs, ledger, residual, summary(residual))
