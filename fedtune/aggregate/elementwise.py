"""Rules that look at single entries of products: by blocks of rows, so that clients x d x k never stands in
memory, then back to a pair.

One module's d x k result does stand there (4096 x 4096: 128 MiB). Getting its factors back costs a dense SVD
up to 1024, above that
a subspace iteration, O(d k rank) a pass; an entry of a product costs r multiplications a client: O(clients d
k r) a module. On one
core, for ten clients of rank 16 and 4096 x 4096, 6 to 10 s where the mean of products takes 0.15 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.product import Spectrum, balanced, beyond, ratio, signed
from fedtune.rng import stream

BLOCK = 1 << 23  # float64 values in a block: 64 MiB
DENSE = 1024  # up to here LAPACK's whole SVD takes under a second
MORE, PASSES = 16, 12  # extra directions and power passes of the subspace iteration
STILL = 1e-9  # relative change of the singular values at which it stands

Across = Callable[[np.ndarray], np.ndarray]


def product_entries(parts: Sequence[Pair], across: Across) -> np.ndarray:
    """`across` maps (parts, rows, k) entries of the products B @ A to (rows, k); the result is (d, k)."""
    made = np.empty((parts[0].B.shape[0], parts[0].A.shape[1]))
    for rows, block in product_blocks(parts):
        made[rows] = across(block)
    return made


def product_blocks(parts: Sequence[Pair]) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of all products, (parts, rows, k) float64 each."""
    d, k = parts[0].B.shape[0], parts[0].A.shape[1]
    step = max(1, BLOCK // (len(parts) * k))
    right = [np.asarray(part.A, dtype=np.float64) for part in parts]
    for start in range(0, d, step):
        rows = slice(start, min(d, start + step))
        yield (
            rows,
            np.stack(
                [np.asarray(part.B[rows], dtype=np.float64) @ a for part, a in zip(parts, right, strict=True)]
            ),
        )


def plain_entries(values: Sequence[np.ndarray], across: Across) -> np.ndarray:
    """The same for tensors that are no pairs: `across` maps (clients, n) to (n,); the shape is theirs."""
    flat = [np.asarray(value).reshape(-1) for value in values]
    made = np.empty(flat[0].size)
    step = max(1, BLOCK // len(flat))
    for start in range(0, flat[0].size, step):
        made[start : start + step] = across(
            np.stack([value[start : start + step] for value in flat]).astype(np.float64)
        )
    return made.reshape(np.shape(values[0]))


def factored(
    matrix: np.ndarray, rank: int, scale: float, module: str, spare: np.ndarray
) -> tuple[Pair, float]:
    """The best pair of this rank for a dense matrix, and its relative error."""
    of = leading(matrix, rank)
    whole = float(np.linalg.norm(matrix))
    error = (
        beyond(of, rank)
        if min(matrix.shape) <= DENSE
        else math.sqrt(max(0.0, whole**2 - float(of.S[:rank] @ of.S[:rank])))
    )
    return balanced(of, rank, scale, module, spare), ratio(error, whole)


def leading(matrix: np.ndarray, rank: int) -> Spectrum:
    """The greatest `rank` directions: exact up to DENSE, else Halko, Martinsson and Tropp 2011, algorithm
    4.4, from a start of its own."""
    if min(matrix.shape) <= DENSE:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        basis = np.linalg.qr(
            matrix @ stream("aggregate subspace", *matrix.shape).normal(size=(matrix.shape[1], rank + MORE))
        )[0]
        last = np.zeros(rank)
        for _ in range(PASSES):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
            u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
            if np.abs(s[:rank] - last).max() <= STILL * s[0]:
                break
            last = s[:rank]
        u = basis @ u
    kept = s > 2.0**-24 * s[0]
    return signed(u[:, kept], s[kept], vt[kept])
