"""What the kernels are held against: formulas one parameter at a time, in Python's own integers, and the
rounding of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.zeroth import Pool, walk
from fedtune.zeroth.normal import TABLE

LOW = 2**32 - 1
POOLS = (
    Pool(77, 32),
    Pool(2**64 - 1, 256),
    Pool(3, 8192),
    Pool(5, 50, "independent"),
    Pool(2**63, 33, "independent", "gaussian"),
)


def perturb(named: Any, pool: Pool, k: int, step: float, **more: Any) -> None:
    """One move."""
    walk(named, pool, [(k, step)], **more)


def philox(counter: tuple[int, int, int, int], key: int) -> list[int]:
    """Philox4x32-10 of one counter, from the paper's figure."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & LOW, key >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & LOW, (a >> 32) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return [c0, c1, c2, c3]


def word(key: int, family: int, stream: int, number: int) -> int:
    block = number // 4
    return philox((block & LOW, block >> 32, stream, family), key)[number % 4]


def value(pool: Pool, k: int, i: int) -> int:
    """direction_k at parameter i, as decision 0004 and the docstrings of the pool define it."""
    if pool.directions == "gaussian":
        return int(TABLE[word(pool.key, 3, k, i // 4) >> 8 * (i % 4) & 255])
    if pool.kind == "independent":
        return 1 - 2 * (word(pool.key, 2, k, i // 32) >> i % 32 & 1)
    row = (i + word(pool.key, 1, 0, i // pool.size)) % pool.size
    return (1 - 2 * (word(pool.key, 0, 0, i // 32) >> i % 32 & 1)) * (-1) ** (k & row).bit_count()


def weight(base: np.ndarray, whole: np.ndarray, factor: float) -> np.ndarray:
    """RN(base + RN(factor * whole)), and the base's own bits where the term is zero."""
    term = (factor * whole.astype(np.float64)).astype(np.float32)
    return np.where(term == 0, base, base + term)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit: -0.0 is not 0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
