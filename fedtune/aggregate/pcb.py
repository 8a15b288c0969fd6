"""PCB-Merging's scores (Du et al. 2024, arXiv:2410.02396, released code): how much an entry matters in its expert, and to the others.

a = |tau|, clipped to its 1 % and 99 % quantiles, mapped to [0, 1]; intra = exp(N a^2); inter = sum_j tanh(sgn(tau) a sgn(tau_j) a_j);
beta = max(intra inter, its 1 - keep quantile), mapped to [0, 1]; the merge is lam sum(beta tau) / sum(beta).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.aggregate.elementwise import Across, product_blocks, product_entries
from fedtune.aggregate.pairs import Pair

CLIP = (0.01, 0.99)


def pcb_entries(parts: Sequence[Pair], keep: float, lam: float) -> Across:
    """Scores are made three times, to find quantiles and ends of one expert's at a time: memory d x k, time three merges and N partitions."""
    ends = np.array([np.quantile(np.abs(part.B @ part.A), CLIP) for part in parts])
    low, span = ends[:, 0, None, None], np.maximum(ends[:, 1] - ends[:, 0], np.finfo(float).tiny)[:, None, None]

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
        merged: np.ndarray = lam * np.divide((beta * tau).sum(axis=0), total, out=np.zeros_like(total), where=total > 0)
        return merged

    return merge
