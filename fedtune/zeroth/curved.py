"""A diagonal curvature from what the pools before have moved (HiSo, ICLR 2026): public whole numbers alone,
so everybody has the same one.

HiSo divides a direction by the root of a moving average of squared updates. Here, after pools with sums S_1
.. S_e, parameter i goes

    D_i = RN(sqrt(2 m / (v_i + m))),   v_i = sum of S_i^2,   m = sum over pools of sum_k A_k^2, the mean of
    v_i over all directions that could be

times as far along a direction of the next pool: the plain mean of squares, damped by its own mean, so that D
is below 1.42 and 1 where v_i = m.
Every operation is one of IEEE's in float64, elementwise, so all devices agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from fedtune.zeroth.pool import Pool, Work

Sums = Sequence[tuple[Pool, np.ndarray]]


class Squares:
    """v and m of a tile, pool after pool."""

    def __init__(self) -> None:
        self.each: Any = 0.0
        self.mean = 0.0

    def take(self, total: Any, mean: float) -> None:
        self.each, self.mean = self.each + total * total, self.mean + mean

    def factor(self, code: ModuleType) -> Any:
        """D as float64 values that are float32; 1 before anything has moved."""
        return code.single(code.root(2 * self.mean / (self.each + self.mean))) if self.mean else 1.0


def expected(pool: Pool, accumulators: np.ndarray) -> float:
    """E[S_i^2] over directions: exact before its one rounding."""
    return float(sum(a * a for a in accumulators.tolist() if a)) / pool.unit**2


def summed(code: ModuleType, sums: Sums, scale: float) -> Work:
    """out = base + sum over pools of RN(scale * S * D), D from the pools before. sums: int64, checked."""
    parts = [
        (code.adder(pool, accumulators), expected(pool, accumulators), scale * pool.unit)
        for pool, accumulators in sums
    ]

    def work(out: Any, base: Any | None, offset: int) -> None:
        for at in range(0, len(out), code.LENGTH):
            piece, seen = out[at : at + code.LENGTH], Squares()
            first = piece if base is None else base[at : at + code.LENGTH]
            code.put(piece, first, code.zeros(piece))
            for add, mean, factor in parts:
                total = add(offset + at, piece)
                code.put(piece, piece, total * factor * seen.factor(code))
                seen.take(total, mean)

    return work


def factors(code: ModuleType, sums: Sums) -> Work:
    """out = D after these pools."""
    parts = [(code.adder(pool, accumulators), expected(pool, accumulators)) for pool, accumulators in sums]

    def work(out: Any, base: Any | None, offset: int) -> None:
        for at in range(0, len(out), code.LENGTH):
            piece, seen = out[at : at + code.LENGTH], Squares()
            for add, mean in parts:
                seen.take(add(offset + at, piece), mean)
            piece[:] = seen.factor(code)

    return work


def along(code: ModuleType, pool: Pool, moves: Sequence[tuple[int, float]]) -> Work:
    """out += RN(step * z_k * by) for each move (k, step) in order; `by` stands where other work has its
    base."""
    parts = []
    for k, step in moves:
        one = np.zeros(pool.size, np.int64)
        one[k] = 1
        parts.append((code.adder(pool, one), step * pool.unit))

    def work(out: Any, by: Any, offset: int) -> None:
        for at in range(0, len(out), code.LENGTH):
            piece = out[at : at + code.LENGTH]
            wide = code.wide(by[at : at + code.LENGTH])
            for add, factor in parts:
                code.put(piece, piece, add(offset + at, piece) * factor * wide)

    return work
