"""FFA-LoRA: A is random, common and frozen, B is averaged (Sun et al. 2024, arXiv:2403.12313). Up: B and the rest, half of LoRA.

With one A the mean of products is the product of means: exact, and noise on B is not multiplied by noise on A.
"""

from __future__ import annotations

from fedtune.aggregate.answer import Names, Rule
from fedtune.aggregate.pairs import factors


def ffa() -> Rule:
    return Rule("ffa", linear=True, trains=without_a, sends=without_a)


def without_a(names: Names, number: int) -> frozenset[str]:
    held = frozenset(names)
    return held - factors(held, "A")
