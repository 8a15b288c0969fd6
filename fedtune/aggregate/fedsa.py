"""FedSA-LoRA: A is shared, every client keeps its own B (Guo et al. 2025, arXiv:2410.01463). Up: A and the rest.

There is no one global adapter: the server's B stays as it started, and a client without memory starts from that.
"""

from __future__ import annotations

from fedtune.aggregate.answer import Names, Rule
from fedtune.aggregate.pairs import factors


def fedsa() -> Rule:
    return Rule("fedsa", linear=True, sends=without_b, stays=own_b)


def without_b(names: Names, number: int) -> frozenset[str]:
    held = frozenset(names)
    return held - factors(held, "B")


def own_b(names: Names) -> frozenset[str]:
    return factors(names, "B")
