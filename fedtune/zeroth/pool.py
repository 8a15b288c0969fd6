"""K directions by a key, and in plain numpy what one of them is and what a sum of them is: the oracle of
every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.zeroth import normal
from fedtune.zeroth.philox import BYTES, ROTATION, SHARED, SIGNS, bits, words

Work = Callable[
    [Any, Any, int], None
]  # out, base (None: out itself), offset of the first: arrays for cpu.py, tensors for device.py
Piece = tuple[Any, Any, int]  # what a Work is called with
EXACT = 2**53  # whole numbers below this are themselves in float64


@dataclass(frozen=True)
class Pool:
    """K directions z_k, each a function of (key, k, offset of a parameter in canonical order) and nothing
    else.

    independent  z_k is drawn from its own stream: signs, or whole numbers with the shape of a normal
                 distribution
    hadamard     z_k(i) = r(i) * (-1)^popcount(k AND h(i)), with signs r that all share and h(i) = (i + c) mod
                 K, where c is drawn for each span of
                 K parameters. Alone a z_k is independent signs; over whole spans they are exactly orthogonal;
                 a sum of all is one transform of K
                 numbers and one pass over the parameters (docs/decisions/0004-hadamard-pool.md)

    key is below 2**64; size is K, at least 32, and a power of two if hadamard. Raises ValueError otherwise.
    """

    key: int
    size: int
    kind: Literal["hadamard", "independent"] = "hadamard"
    directions: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        if not 0 <= self.key < 1 << 64:
            raise ValueError(f"a pool's key is {self.key}; it must be at least 0 and below 2**64")
        if not 32 <= self.size <= 1 << 31:
            raise ValueError(f"a pool of {self.size} directions; there must be 32 to 2**31")
        if self.kind == "hadamard" and (self.size & (self.size - 1) or self.directions != "rademacher"):
            raise ValueError(
                f"a Hadamard pool of {self.size} {self.directions} directions; it needs a power of two of "
                "rademacher ones"
            )

    @property
    def unit(self) -> float:
        """What a whole number of `direction` stands for: z = unit * direction has E[z^2] = 1."""
        return normal.UNIT if self.directions == "gaussian" else 1.0

    @property
    def largest(self) -> int:
        """The largest absolute value in a direction."""
        return int(normal.TABLE[-1]) if self.directions == "gaussian" else 1

    def direction(self, k: int, offset: int, count: int) -> np.ndarray:
        """Values of direction k at `count` parameters from `offset`: int16 (count,); times `unit`, that is
        z_k."""
        if not 0 <= k < self.size:
            raise ValueError(f"direction {k} of a pool of {self.size}")
        if self.directions == "gaussian":
            drawn = (
                words(self.key, BYTES, k, offset // 4, -(-(offset + count) // 4) - offset // 4)
                .astype("<u4")
                .view(np.uint8)
            )
            heights: np.ndarray = normal.TABLE[drawn[offset % 4 :][:count]]
            return heights
        if self.kind == "independent":
            return signs(bits(self.key, SIGNS, k, offset, count))
        return signs(bits(self.key, SHARED, 0, offset, count) ^ parity(self.places(offset, count), k))

    def places(self, offset: int, count: int) -> np.ndarray:
        """h(i) of a Hadamard pool, the row of the transform that parameter i takes: uint64 (count,)."""
        at = np.arange(offset, offset + count, dtype=np.uint64)
        span = at >> np.uint64(self.size.bit_length() - 1)
        first, last = (int(span[0]), int(span[-1])) if count else (0, 0)
        drawn = words(self.key, ROTATION, 0, first, last - first + 1).astype(np.uint64)
        rows: np.ndarray = (at + drawn[span - np.uint64(first)]) & np.uint64(self.size - 1)
        return rows


def parity(places: np.ndarray, k: int) -> np.ndarray:
    """Whether row h of the transform is negative at k, popcount(k AND h) mod 2: uint8, of uint64 places."""
    odd: np.ndarray = np.bitwise_count(places & np.uint64(k)) & np.uint8(1)
    return odd


def hadamard_row(size: int, k: int) -> np.ndarray:
    """What direction k is multiplied by at each row of the transform, (-1)^popcount(k AND h): int16 (K,)."""
    return signs(parity(np.arange(size, dtype=np.uint64), k))


def signs(drawn: np.ndarray) -> np.ndarray:
    """0 is +1, 1 is -1: int16."""
    return np.int16(1) - 2 * drawn.astype(np.int16)


def wht(values: np.ndarray) -> np.ndarray:
    """Walsh-Hadamard transform in natural order: (K,) -> (K,) with out[h] = sum_k (-1)^popcount(k AND h)
    values[k]; its own transpose."""
    out, half = values.copy(), 1
    while half < out.size:
        pairs = out.reshape(-1, 2, half)
        out = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
        half *= 2
    return out


def bounded(sums: Sequence[tuple[Pool, np.ndarray]]) -> list[tuple[Pool, np.ndarray]]:
    """The same with int64 accumulators, after checking that every sum that replay makes of them is exact.

    |S_i|, and each intermediate of the transform, is at most the sum of |A_k| times the largest value
    of a direction, over all pools. Below 2**53 nothing overflows and float64 holds it exactly. Raises W606
    beyond that, and ValueError for accumulators of another length or type.
    """
    most = 0.0
    for pool, accumulators in sums:
        if accumulators.shape != (pool.size,) or accumulators.dtype.kind not in "iu":
            raise ValueError(
                f"accumulators are {accumulators.dtype} {accumulators.shape}; this pool needs ({pool.size},) "
                "whole numbers"
            )
        most += float(np.abs(accumulators.astype(np.float64)).sum()) * pool.largest
    if most >= EXACT:
        raise FedtuneError(
            "W606",
            f"accumulators that add up to {most:.3g}",
            "less than 2**53 in all",
            "lower method.clip or the weights of the clients",
        )
    return [(pool, accumulators.astype(np.int64)) for pool, accumulators in sums]


def combine(pool: Pool, accumulators: np.ndarray, offset: int, count: int) -> np.ndarray:
    """S_i = sum_k A_k direction_k(i) at `count` parameters from `offset`: int64 (count,), exact. Raises as
    `bounded`."""
    ((_, whole),) = bounded([(pool, accumulators)])
    if pool.kind == "hadamard":
        found: np.ndarray = wht(whole)[pool.places(offset, count)] * signs(
            bits(pool.key, SHARED, 0, offset, count)
        )
        return found
    total = np.zeros(count, np.int64)
    for k in np.flatnonzero(whole):
        total += pool.direction(int(k), offset, count) * whole[k]
    return total
