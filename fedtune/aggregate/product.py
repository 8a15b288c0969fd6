"""Sums of products B @ A without ever forming one: thin QR of the stacked factors, SVD of the small core.

sum_i c_i B_i A_i = [c_1 B_1 ...][A_1; ...] = Q_b (R_b R_a^T) Q_a^T, and the core in brackets is R x R with R
the sum of ranks.
Cost O((d + k) R^2) instead of O(min(d, k)^2 max(d, k)), and exact to float64 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedtune.aggregate.pairs import Pair
from fedtune.rng import stream

ROUNDING = 1e-13  # of the size of the parts: what float64 leaves of a sum that is zero
RESOLUTION = 2.0**-24  # of the greatest singular value: half a unit of the float32 in which factors are kept


class Spectrum(NamedTuple):
    """U (d x q), S (q,) descending, Vt (q x k) of a product; singular values that are rounding are left
    out."""

    U: np.ndarray
    S: np.ndarray
    Vt: np.ndarray


@dataclass
class ProductSum:
    """sum_i times_i B_i A_i, one client at a time; holds factors of at most 2 min(d, k) ranks, however many
    clients come."""

    parts: list[tuple[float, Pair]] = field(default_factory=list)

    def add(self, pair: Pair, times: float) -> None:
        self.parts.append((times, pair))
        least = min(pair.B.shape[0], pair.A.shape[1])
        if sum(part.rank for _, part in self.parts) > 2 * least:
            u, s, vt = spectrum(self.stacked())
            self.parts = [(1.0, Pair(u * s, vt))] if s.size else []

    def stacked(self, times: float = 1.0) -> Pair:
        """All parts side by side, float64: B (d x R), A (R x k)."""
        if not self.parts:
            raise ValueError("an empty sum has no shape")
        b = np.concatenate(
            [np.multiply(part.B, factor * times, dtype=np.float64) for factor, part in self.parts], axis=1
        )
        return Pair(
            b, np.concatenate([np.asarray(part.A, dtype=np.float64) for _, part in self.parts], axis=0)
        )


def spectrum(pair: Pair) -> Spectrum:
    """The singular value decomposition of B @ A, the same bytes for the same input."""
    b, a = np.asarray(pair.B, dtype=np.float64), np.asarray(pair.A, dtype=np.float64)
    size = float(np.linalg.norm(b, axis=0) @ np.linalg.norm(a, axis=1))
    qb, rb = np.linalg.qr(b)  # (d, min(d, R)), (min(d, R), R)
    qa, ra = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = s > max(ROUNDING * size, RESOLUTION * s[0])
    return signed(qb @ u[:, kept], s[kept], vt[kept] @ qa.T)


def signed(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> Spectrum:
    """The largest entry of every left vector made positive: a decomposition leaves the sign open, a run may
    not."""
    if not s.size:
        return Spectrum(u, s, vt)
    sign = np.where(u[np.abs(u).argmax(axis=0), np.arange(s.size)] < 0, -1.0, 1.0)
    return Spectrum(u * sign, s, vt * sign[:, None])


def balanced(of: Spectrum, rank: int, scale: float, module: str, spare: np.ndarray) -> Pair:
    """The best pair of this rank: B = U S^.5, A = S^.5 Vt, so that scale B @ A is the product (Eckart and
    Young 1936).

    Where the product has fewer directions, B is zero and A gets rows of `spare` (the A before), then rows as
    LoRA starts with:
    were both zero, no gradient would ever reach them.
    """
    q = min(rank, of.S.size)
    b, a = np.zeros((of.U.shape[0], rank)), np.zeros((rank, of.Vt.shape[1]))
    root = np.sqrt(of.S[:q] / scale)
    b[:, :q], a[:q] = of.U[:, :q] * root, root[:, None] * of.Vt[:q]
    a[q:] = rows(module, spare, q, rank)
    return Pair(b, a)


def rows(module: str, spare: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of A to train from: those of `spare`, or peft's Kaiming-uniform +-1/sqrt(k) where it
    has none or zeros."""
    have = np.zeros((stop, spare.shape[1]))
    count = min(stop, spare.shape[0])
    have[:count] = spare[:count]
    empty = np.flatnonzero(~have[start:].any(axis=1)) + start
    if empty.size:
        bound = 1 / math.sqrt(spare.shape[1])
        drawn = stream(f"aggregate spare rows {module}").uniform(-bound, bound, (stop, spare.shape[1]))
        have[empty] = drawn[empty]
    return have[start:]


def beyond(of: Spectrum, rank: int) -> float:
    """The Frobenius norm of what the best approximation of this rank leaves out."""
    return float(np.linalg.norm(of.S[rank:]))


def inner(one: Pair, other: Pair) -> float:
    """<B1 A1, B2 A2>_F through Gram matrices of the factors: O((d + k) r1 r2)."""
    return float(np.sum((one.B.T @ other.B) * (one.A @ other.A.T)))


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
