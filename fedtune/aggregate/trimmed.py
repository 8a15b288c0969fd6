"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498): of each entry the least and greatest `trim` of clients are left out.

Weights do not count. floor(trim n) answers go at either end: with fewer than 1/trim clients it is the mean. For the cost see `elementwise`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from fedtune.aggregate.answer import Answer, Combined, Rule
from fedtune.aggregate.each import entry_by_entry
from fedtune.aggregate.resize import for_rank
from fedtune.types import Round

WHOLE = 1e-9  # 0.3 * 10 is 3 for us, though not for float64


def trimmed(trim: float = 0.2) -> Rule:
    return Rule("trimmed", linear=False, combine=partial(combine, trim=trim), mixed=True, for_rank=for_rank)


def combine(answers: Iterable[Answer], before: Combined, scale: float, now: Round, *, trim: float) -> Combined:
    return entry_by_entry(answers, before, scale, partial(inside, trim=trim))


def cut_of(n: int, trim: float) -> int:
    """How many of n answers go at either end."""
    return int(trim * n + WHOLE)


def inside(entries: np.ndarray, trim: float) -> np.ndarray:
    """(clients, ...) -> (...): the mean of what is neither among the least nor the greatest."""
    n = len(entries)
    cut = cut_of(n, trim)
    kept: np.ndarray = np.sort(entries, axis=0)[cut : n - cut].mean(axis=0) if cut else entries.mean(axis=0)
    return kept
