"""Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498): each entry is the median over clients, of the
products for LoRA pairs.

Weights do not count: a client could claim any. Holds while fewer than half of the clients are wrong. For the
cost see `elementwise`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np

from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.aggregate.single_answers import entry_by_entry
from fedtune.types import Round


class Median(Rule):
    """rule = "median": the median of every entry."""

    rule: Literal["median"] = "median"
    linear: ClassVar[bool] = False
    mixed: ClassVar[bool] = True
    weighted: ClassVar[bool] = False

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        return entry_by_entry(answers, before, scale, middle)


def middle(entries: np.ndarray) -> np.ndarray:
    """(clients, ...) -> (...)"""
    found: np.ndarray = np.median(entries, axis=0)
    return found
