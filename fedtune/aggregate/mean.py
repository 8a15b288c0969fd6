"""FedIT, FedAvg on factors: mean B and mean A (Zhang et al. 2023, arXiv:2305.05644). Up: both factors.

Not the mean of the products: (mean B)(mean A) has cross terms B_i A_j, which `Combined.report` measures as
drift.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedtune.aggregate.rule import Rule


class Mean(Rule):
    """rule = "mean": the weighted mean of every tensor (FedAvg)."""

    rule: Literal["mean"] = "mean"
    steps: ClassVar[bool] = True
