"""FFA-LoRA: A is random, common and frozen, B is averaged (Sun et al. 2024, arXiv:2403.12313). Up: B and the
rest, half of LoRA.

With one A the mean of products is the product of means: exact, and noise on B is not multiplied by noise on
A.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedtune.aggregate.pairs import factors
from fedtune.aggregate.rule import Names, Rule


class FFA(Rule):
    """rule = "ffa": A is frozen, B is averaged."""

    rule: Literal["ffa"] = "ffa"
    pairs: ClassVar[bool] = True
    steps: ClassVar[bool] = True

    def trains(self, names: Names, number: int) -> frozenset[str]:
        held = frozenset(names)
        return held - factors(held, "A")
