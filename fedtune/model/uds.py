"""UDS: of the candidates for a batch, the rows from which most is left to learn, unlike those of before. The
settings; batch_choice.py chooses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from fedtune.settings import Settings
from fedtune.types import TOKEN_TASKS


class Uds(Settings):
    """[method.train.uds]: each micro-batch is a set of candidates, of which those with the highest score
    train: the nuclear norm of a row's logits (tokens, vocabulary), padding left out, and `alpha` times its
    mean distance, as projected, from the rows that trained before in this round (utility-diversity sampling,
    arXiv:2510.16882). One forward pass more for each candidate, alone."""

    keep: float = Field(1.0, gt=0, le=1)
    """Share of each micro-batch that trains, one row at least; 1 is all, and no pass more."""
    alpha: float = Field(0.002, ge=0)
    """Weight of the distance."""
    buffer: int = Field(1024, ge=1)
    """So many of the last rows are compared with."""

    @property
    def idle(self) -> bool:
        return self.keep == 1

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.idle:
            return
        if recipe.data.task not in TOKEN_TASKS:
            yield (
                f"method.train.uds with data.task = '{recipe.data.task}'",
                "causal-lm or instruct",
                "remove [method.train.uds]",
            )
        if recipe.method.spends:
            yield (
                "method.train.uds with method.train.private",
                "rows that are in a step by chance alone",
                "remove [method.train.uds]",
            )
