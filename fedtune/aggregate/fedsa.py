"""FedSA-LoRA: A is shared, every client keeps its own B (Guo et al. 2025, arXiv:2410.01463). Up: A and the
rest.

There is no one global adapter: the server's B stays as it started, and a client without a state starts from
that.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedtune.aggregate.pairs import factors
from fedtune.aggregate.rule import Names, Rule


class FedSA(Rule):
    """rule = "fedsa": A is shared, every client keeps its own B."""

    rule: Literal["fedsa"] = "fedsa"
    pairs: ClassVar[bool] = True

    def sends(self, names: Names, number: int) -> frozenset[str]:
        held = frozenset(names)
        return held - factors(held, "B")

    def stays(self, names: Names) -> frozenset[str]:
        return factors(names, "B")
