"""Krum and Multi-Krum (Blanchard et al. 2017, "Machine Learning with Adversaries"): the answers that have the
nearest neighbours.

Distances are between products, through Gram matrices. An answer's score is the sum of squared distances to
its n - faulty - 2
nearest; the `chosen` best are averaged as products, all equally, and cut to rank by SVD. With `chosen` = 1 it
is Krum. Weights do not count.
Costs most of the signal where clients differ honestly. Below 2 faulty + 3 answers the rule promises nothing:
a recipe that asks fewer
clients is refused, a round in which too many drop out changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.aggregate.flexlora import mean_of_products
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule, TooFew
from fedtune.aggregate.single_answers import hold, squares
from fedtune.types import Round


class Krum(Rule):
    """rule = "krum": the answers with the nearest neighbours, averaged."""

    rule: Literal["krum"] = "krum"
    linear: ClassVar[bool] = False
    mixed: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    faulty: int = Field(1, ge=0)
    """Number of answers that may be wrong. It needs 2 faulty + 3 answers; a round in which fewer come changes
    nothing (R410), the run goes on."""
    chosen: int = Field(0, ge=0)
    """Number of answers that are averaged (Multi-Krum); 0 means all but the faulty ones."""

    def limits(self, asked: int) -> Iterator[tuple[str, str, str]]:
        needed = 2 * self.faulty + 3
        if asked < needed:
            yield (
                f"{asked} answers per round for aggregate.faulty = {self.faulty}",
                f"at least {needed} (2 faulty + 3)",
                "select more clients, or lower it",
            )

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        """Raises TooFew (R410) for fewer than 2 faulty + 3 answers."""
        held = hold(answers, before)
        n = len(held)
        if n < 2 * self.faulty + 3:
            found, expected = (
                f"{n} answers where {self.faulty} may be faulty",
                f"at least {2 * self.faulty + 3}",
            )
            raise TooFew(
                "R410",
                found,
                expected,
                "look at the clients' errors; if it happens often, select more clients or lower "
                "aggregate.faulty",
            )
        near = np.sort(squares(held, before.tensors), axis=1)[:, 1 : n - self.faulty - 1]  # without oneself
        best = np.argsort(near.sum(axis=1), kind="stable")[: self.chosen or n - self.faulty]
        made = mean_of_products((replace(held[i].answer, weight=1.0) for i in sorted(best)), before, scale)
        return replace(made, report=dict(made.report) | {"kept": float(len(best))})
