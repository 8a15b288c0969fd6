"""Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498): each entry is the median over clients, of the products for LoRA pairs.

Weights do not count: a client could claim any. Holds while fewer than half of the clients are wrong. For the cost see `elementwise`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedtune.aggregate.answer import Answer, Combined, Rule
from fedtune.aggregate.each import entry_by_entry
from fedtune.aggregate.resize import for_rank
from fedtune.types import Round


def median() -> Rule:
    return Rule("median", linear=False, combine=combine, mixed=True, for_rank=for_rank)


def combine(answers: Iterable[Answer], before: Combined, scale: float, now: Round) -> Combined:
    return entry_by_entry(answers, before, scale, middle)


def middle(entries: np.ndarray) -> np.ndarray:
    """(clients, ...) -> (...)"""
    found: np.ndarray = np.median(entries, axis=0)
    return found
