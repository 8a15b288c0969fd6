"""RoLoRA: odd rounds train and average B, even rounds A (Chen et al. 2025, arXiv:2502.01755). Up: one factor
and the rest.

The factor at rest is the same at every client, so each round's mean is exact.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedtune.aggregate.pairs import factors
from fedtune.aggregate.rule import Names, Rule


class RoLoRA(Rule):
    """rule = "rolora": B and A by turns."""

    rule: Literal["rolora"] = "rolora"
    pairs: ClassVar[bool] = True

    def trains(self, names: Names, number: int) -> frozenset[str]:
        """B in round 1, because B starts at zero: with B at zero, A has no gradient."""
        held = frozenset(names)
        return held - factors(held, "A" if number % 2 else "B")
