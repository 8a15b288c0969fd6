"""PCB-Merging (Du et al. 2024, arXiv:2410.02396): entries are weighed by how much they matter in their
expert, and to the others.

The paper's formula and its released code are not the same, and this follows the code (of its two scripts the
one that scales the
products in `inter`, pcb_ES.py); all products are entry by entry:

    paper  intra_i = softmax(N norm(tau_i tau_i))      inter_i = sum_j softmax(norm(tau_i tau_j))
           beta_i = intra_i inter_i, zero outside its greatest `keep`
    code   a_i = |tau_i| clipped to its 1 % and 99 % quantiles, mapped to [0, 1]
           intra_i = exp(N a_i^2)                        inter_i = sum_j tanh(sgn(tau_i) a_i sgn(tau_j) a_j)
           beta_i = max(intra_i inter_i, its 1 - keep quantile), mapped to [0, 1]
    both   lam sum_i(beta_i tau_i) / sum_i(beta_i)

Why the code: it is what can be compared with, and it does what the paper describes where the formula does
not. A softmax is positive,
so that an expert of the opposite sign would count for an entry, though less; tanh counts it against. Without
the clipping, one outlier
sets the scale of a whole module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.aggregate.elementwise import Across, product_blocks, product_entries
from fedtune.aggregate.pairs import Pair

CLIP = (0.01, 0.99)


def pcb_entries(parts: Sequence[Pair], keep: float, lam: float) -> Across:
    """Scores are made three times, to find quantiles and ends of one expert's at a time: memory d x k, time
    three merges and N partitions."""
    ends = np.array([np.quantile(np.abs(part.B @ part.A), CLIP) for part in parts])
    low, span = (
        ends[:, 0, None, None],
        np.maximum(ends[:, 1] - ends[:, 0], np.finfo(float).tiny)[:, None, None],
    )

    def scores(tau: np.ndarray) -> np.ndarray:
        """(experts, rows, k) -> the same: intra times inter."""
        a = np.clip((np.abs(tau) - low) / span, 0.0, 1.0)
        signed = np.sign(tau) * a
        inter = np.stack([np.tanh(one * signed).sum(axis=0) for one in signed])
        result: np.ndarray = np.exp(len(tau) * a**2) * inter
        return result

    def floor(of: int) -> float:
        return float(np.quantile(product_entries(parts, lambda tau: scores(tau)[of]), 1 - keep))

    floors = np.array([floor(i) for i in range(len(parts))])[:, None, None]
    tops = np.max([scores(tau).max(axis=(1, 2)) for _, tau in product_blocks(parts)], axis=0)[:, None, None]
    width = np.where(tops > floors, tops - floors, 1.0)

    def merge(tau: np.ndarray) -> np.ndarray:
        beta = (np.maximum(scores(tau), floors) - floors) / width
        total = beta.sum(axis=0)
        merged: np.ndarray = lam * np.divide(
            (beta * tau).sum(axis=0), total, out=np.zeros_like(total), where=total > 0
        )
        return merged

    return merge
