"""FedIT, FedAvg on factors: mean B and mean A (Zhang et al. 2023, arXiv:2305.05644). Up: both factors.

Not the mean of the products: (mean B)(mean A) has cross terms B_i A_j, which `drift` measures.
"""

from __future__ import annotations

from fedtune.aggregate.answer import Rule


def mean() -> Rule:
    return Rule("mean", linear=True)
