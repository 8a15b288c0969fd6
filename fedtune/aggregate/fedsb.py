"""Fed-SB: W_0 + s B R A with B and A fixed and equal on all, only R (r x r) is trained and averaged (Singhal
et al. 2025, arXiv:2502.15436).

Up: `<module>.lora_R.weight` and the rest, r^2 values a module. The mean of R is the mean of products: exact,
and linear. The
artefact is a stock pair, (B R, A).
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np

from fedtune.aggregate.pairs import Pair, factors
from fedtune.aggregate.product import signed, spectrum
from fedtune.aggregate.rule import Names, Rule


class Core(NamedTuple):
    """B (d x r) and A (r x k) with orthonormal columns and rows, R (r x r) between them."""

    B: np.ndarray
    R: np.ndarray
    A: np.ndarray


class FedSB(Rule):
    """rule = "fedsb": only a small matrix between fixed factors is trained and averaged."""

    rule: Literal["fedsb"] = "fedsb"
    pairs: ClassVar[bool] = True
    core: ClassVar[bool] = True

    def trains(self, names: Names, number: int) -> frozenset[str]:
        held = frozenset(names)
        return held - factors(held, "A") - factors(held, "B")


def start(update: np.ndarray | Pair, rank: int, scale: float) -> Core:
    """B = U, R = S / s, A = Vt of the wanted first update (d x k), usually the mean first step: s B R A is
    its best approximation of this rank.

    LoRA-SB, Ponkshe et al. 2024 (arXiv:2411.19557), section 3. Where the update has fewer directions, R is
    zero there.
    """
    of = (
        spectrum(update)
        if isinstance(update, Pair)
        else signed(*np.linalg.svd(np.asarray(update, dtype=np.float64), full_matrices=False))
    )
    q = min(rank, of.S.size)
    b, a = completed(of.U[:, :q], rank), completed(of.Vt[:q].T, rank).T
    r = np.diag(np.pad(of.S[:q], (0, rank - q))) / scale
    return Core(b.astype(np.float32), r.astype(np.float32), a.astype(np.float32))


def completed(basis: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal columns, made `rank` of them by the unit vectors that are least in their span."""
    missing = rank - basis.shape[1]
    if missing <= 0:
        return basis
    outside = np.argsort(np.square(basis).sum(axis=1), kind="stable")[:missing]
    unit = np.zeros((basis.shape[0], missing))
    unit[outside, np.arange(missing)] = 1
    unit -= basis @ (basis.T @ unit)
    return np.concatenate([basis, np.linalg.qr(unit - basis @ (basis.T @ unit))[0]], axis=1)


def as_pair(core: Core) -> Pair:
    """The stock pair (B R, A): the same product to rounding of float32."""
    return Pair((np.asarray(core.B, dtype=np.float64) @ core.R).astype(np.float32), core.A)
