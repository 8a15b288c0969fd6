"""Krum and Multi-Krum (Blanchard et al. 2017, "Machine Learning with Adversaries"): the answers that have the nearest neighbours.

Distances are between products, through Gram matrices. An answer's score is the sum of squared distances to its n - faulty - 2
nearest; the `chosen` best are averaged as products, all equally, and cut to rank by SVD. With `chosen` = 1 it is Krum. Weights do not count.
Costs most of the signal where clients differ honestly. Below 2 faulty + 3 answers the rule promises nothing: a recipe that asks fewer
clients is refused, a round in which too many drop out changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from fedtune.aggregate.answer import Answer, Combined, Rule, TooFew
from fedtune.aggregate.each import hold, squares
from fedtune.aggregate.flexlora import combine as mean_of_products
from fedtune.aggregate.resize import for_rank
from fedtune.types import Round


def krum(faulty: int = 1, chosen: int = 0) -> Rule:
    """`chosen` 0 averages all but the faulty ones (Multi-Krum)."""
    return Rule("krum", linear=False, combine=partial(combine, faulty=faulty, chosen=chosen), mixed=True, for_rank=for_rank)


def combine(answers: Iterable[Answer], before: Combined, scale: float, now: Round, *, faulty: int, chosen: int) -> Combined:
    """Raises TooFew (R410) for fewer than 2 faulty + 3 answers."""
    held = hold(answers, before)
    n = len(held)
    if n < 2 * faulty + 3:
        found, expected = f"{n} answers where {faulty} may be faulty", f"at least {2 * faulty + 3}"
        raise TooFew("R410", found, expected, "look at the clients' errors; if it happens often, sample more clients or lower aggregate.faulty")
    near = np.sort(squares(held, before.tensors), axis=1)[:, 1 : n - faulty - 1]  # without oneself
    best = np.argsort(near.sum(axis=1), kind="stable")[: chosen or n - faulty]
    made = mean_of_products((replace(held[i].answer, weight=1.0) for i in sorted(best)), before, scale, now)
    return replace(made, report=dict(made.report) | {"kept": float(len(best))})
