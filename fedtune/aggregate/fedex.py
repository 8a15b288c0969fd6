"""FedEx-LoRA: mean factors, and what they get wrong as a residual (Singhal et al. 2025, arXiv:2410.09432). Up: both factors.

residual += sum p_i s_i B_i A_i - s (mean B)(mean A), of rank at most (clients + 1) r a round; exact unless `extra` cuts it.
The paper adds it to the base; here it stands beside the adapter, compacted to its numerical rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fedtune.aggregate.answer import Answer, Combined, Rule
from fedtune.aggregate.gather import Ledger, alive, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.residual import compact, summary
from fedtune.aggregate.resize import for_rank
from fedtune.types import Round


def fedex(extra: int = 0) -> Rule:
    """`extra` is the greatest rank of the residual; 0 keeps all of it, and it grows until min(d, k)."""
    return Rule("fedex", linear=False, combine=partial(combine, extra=extra), mixed=True, carries=True, for_rank=for_rank)


def combine(answers: Iterable[Answer], before: Combined, scale: float, now: Round, *, extra: int) -> Combined:
    made = gather(answers, before, scale)
    ledger, pairs, residual = Ledger(scale), dict[str, Pair](), dict[str, Pair]()
    for module in made.modules():
        old = before.residual.get(module.name)
        minus = Pair(-scale * module.mean.B, module.mean.A)
        residual[module.name], lost = compact([module.product, minus] + ([old] if old else []), extra)
        ledger.note(module, error=lost)
        pairs[module.name] = alive(module)
    return finished(made, pairs, ledger, residual, summary(residual))
