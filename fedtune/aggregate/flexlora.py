"""FlexLoRA: the mean of products, cut to each rank by SVD (Bai et al. 2024, arXiv:2402.11505). Up: a client's pairs at its own rank.

Eckart and Young: no adapter of the server's rank is nearer to mean(BA). Through the small core of `product`, not a dense SVD.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedtune.aggregate.answer import Answer, Combined, Rule
from fedtune.aggregate.gather import Ledger, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.product import balanced, beyond, spectrum
from fedtune.aggregate.resize import for_rank
from fedtune.types import Round


def flexlora() -> Rule:
    return Rule("flexlora", linear=False, combine=combine, mixed=True, for_rank=for_rank)


def combine(answers: Iterable[Answer], before: Combined, scale: float, now: Round) -> Combined:
    made = gather(answers, before, scale, slices=False)
    ledger, pairs = Ledger(scale), dict[str, Pair]()
    for module in made.modules():
        of, rank = spectrum(module.product), module.before.rank
        pairs[module.name] = balanced(of, rank, scale, module.name, module.before.A)
        ledger.note(module, error=beyond(of, rank), whole=float(np.linalg.norm(of.S)))
    return finished(made, pairs, ledger)
