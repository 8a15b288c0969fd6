"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498): of each entry the least and greatest
`trim` of clients are left out.

Weights do not count. floor(trim n) answers go at either end: with fewer than 1/trim clients it is the mean.
For the cost see `elementwise`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.aggregate.single_answers import entry_by_entry
from fedtune.types import Round

WHOLE = 1e-9  # 0.3 * 10 is 3 for us, though not for float64


class Trimmed(Rule):
    """rule = "trimmed": the mean of every entry without the least and the greatest."""

    rule: Literal["trimmed"] = "trimmed"
    linear: ClassVar[bool] = False
    mixed: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    trim: float = Field(0.2, gt=0, lt=0.5)
    """Share of the answers that is left out at either end; of fewer than 1/trim answers none is, and it is a
    mean."""

    def limits(self, asked: int) -> Iterator[tuple[str, str, str]]:
        if not cut_of(asked, self.trim):
            yield (
                f"{asked} answers per round for aggregate.trim = {self.trim:g}",
                "at least 1/trim, because fewer would be a plain mean",
                "select more clients, or raise it",
            )

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        return entry_by_entry(answers, before, scale, partial(inside, trim=self.trim))


def cut_of(n: int, trim: float) -> int:
    """How many of n answers go at either end."""
    return int(trim * n + WHOLE)


def inside(entries: np.ndarray, trim: float) -> np.ndarray:
    """(clients, ...) -> (...): the mean of what is neither among the least nor the greatest."""
    n = len(entries)
    cut = cut_of(n, trim)
    kept: np.ndarray = np.sort(entries, axis=0)[cut : n - cut].mean(axis=0) if cut else entries.mean(axis=0)
    return kept
