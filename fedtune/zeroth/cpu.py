"""What is done to one float32 tensor on the CPU, by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedtune.zeroth import kernels, normal
from fedtune.zeroth.philox import SHARED, SIGNS
from fedtune.zeroth.pool import Pool, Work, parity

LENGTH = 1 << 15  # parameters whose sums are held at a time: 256 KB


def along(pool: Pool, moves: Sequence[tuple[int, float]]) -> Work:
    """out = base + step * z_k, for each move (k, step) in order."""
    if pool.directions == "gaussian":
        heights = [
            (k, (step * pool.unit * normal.TABLE.astype(np.float64)).astype(np.float32)) for k, step in moves
        ]

        def bytewise(out: np.ndarray, offset: int) -> None:
            for k, table in heights:
                kernels.add_bytes(out, offset, table, k, pool.key)

        return fresh(bytewise)
    steps = np.array([step for _, step in moves], np.float32).view(np.uint32)
    streams = np.array([k for k, _ in moves], np.uint64)
    if pool.kind == "independent":
        none = np.zeros((len(moves), 2), np.uint32)
        return fresh(
            lambda out, offset: kernels.steps_onto(out, offset, steps, none, streams, SIGNS, pool.key)
        )
    flips = np.stack([negative_rows(pool.size, k) for k, _ in moves])
    return fresh(
        lambda out, offset: kernels.steps_onto(out, offset, steps, flips, 0 * streams, SHARED, pool.key)
    )


def negative_rows(size: int, k: int) -> np.ndarray:
    """Which rows of the transform are negative at k, a bit each, and the first 32 again: uint32 (K / 32 +
    1,)."""
    drawn = (
        np.packbits(parity(np.arange(size, dtype=np.uint64), k), bitorder="little")
        .view("<u4")
        .astype(np.uint32)
    )
    return np.concatenate([drawn, drawn[:1]])


def fresh(onto: Callable[[np.ndarray, int], None]) -> Work:
    """From what works in place, what also works from a base."""

    def work(out: np.ndarray, base: np.ndarray | None, offset: int) -> None:
        if base is not None:
            np.copyto(out, base)
        onto(out, offset)

    return work


def from_table(pool: Pool, table: np.ndarray) -> Work:
    """out = base + r(i) * table[h(i)] of a Hadamard pool. table: float32 (K,)."""
    rows = np.concatenate([table, table[:32]]).view(np.uint32)

    def work(out: np.ndarray, base: np.ndarray | None, offset: int) -> None:
        if base is None:
            kernels.table_onto(out, offset, rows, pool.key)
        else:
            kernels.table_from(out, base, offset, rows, pool.key)

    return work


def summed(sums: Sequence[tuple[Pool, np.ndarray]], scale: float) -> Work:
    """out = base + scale * S. sums: pools and int64 accumulators, checked."""
    if not sums:
        return fresh(lambda out, offset: None)
    factor = scale * sums[0][0].unit
    if len(sums) == 1 and sums[0][0].kind == "hadamard":
        table = (factor * transformed(sums[0][1]).astype(np.float64)).astype(np.float32)
        return from_table(sums[0][0], table)
    parts = [prepared(pool, accumulators) for pool, accumulators in sums]

    def work(out: np.ndarray, base: np.ndarray | None, offset: int) -> None:
        total = np.empty(min(LENGTH, out.size), np.int64)
        for at in range(0, out.size, LENGTH):
            piece = out[at : at + LENGTH]
            if base is not None:
                np.copyto(piece, base[at : at + LENGTH])
            whole = total[: piece.size]
            whole.fill(0)
            for part in parts:
                add_sum(whole, offset + at, *part)
            kernels.add_whole(piece, whole, factor)

    return work


def add_sum(whole: np.ndarray, offset: int, pool: Pool, streams: np.ndarray, numbers: np.ndarray) -> None:
    """whole += S of one pool, as `prepared`."""
    if pool.kind == "hadamard":
        kernels.sum_table(whole, offset, numbers, pool.key)
    elif pool.directions == "gaussian":
        kernels.sum_bytes(whole, offset, streams, numbers, normal.TABLE.astype(np.int64), pool.key)
    else:
        kernels.sum_signs(whole, offset, streams, numbers, pool.key)


def prepared(pool: Pool, accumulators: np.ndarray) -> tuple[Pool, np.ndarray, np.ndarray]:
    """Streams and what they are multiplied by, for the kernels: the rows of a Hadamard pool, or the
    directions that are not zero, padded to a multiple of 4."""
    if pool.kind == "hadamard":
        table = transformed(accumulators)
        return pool, np.zeros(0, np.uint64), np.concatenate([table, table[:32]])
    used = np.flatnonzero(accumulators)
    streams = np.concatenate([used, np.zeros(-used.size % 4, used.dtype)]).astype(np.uint64)
    return pool, streams, np.concatenate([accumulators[used], np.zeros(-used.size % 4, np.int64)])


def transformed(accumulators: np.ndarray) -> np.ndarray:
    table = accumulators.copy()
    kernels.wht(table)
    return table


def gathered(pool: Pool, values: np.ndarray, offset: int, factor: float) -> np.ndarray:
    """Sum over one tensor of what `project` adds up: int64, rows (K,) of a Hadamard pool before its
    transform, else (K,) of the directions."""
    total = np.zeros(pool.size + 32 if pool.kind == "hadamard" else -(-pool.size // 4) * 4, np.int64)
    scratch = np.empty(min(LENGTH, values.size), np.int64)
    for at in range(0, values.size, LENGTH):
        piece = values[at : at + LENGTH]
        whole = scratch[: piece.size]
        kernels.nearest(whole, piece, factor)
        if pool.kind == "hadamard":
            kernels.gather_table(total, whole, offset + at, pool.key)
        elif pool.directions == "gaussian":
            kernels.gather_bytes(total, whole, offset + at, normal.TABLE.astype(np.int64), pool.key)
        else:
            kernels.gather_signs(total, whole, offset + at, pool.key)
    if pool.kind == "hadamard":
        total[:32] += total[pool.size :]
    return total[: pool.size]


# --- for curved.py ---


def adder(pool: Pool, accumulators: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
    """From an offset and a piece of parameters to their S: float64, exact."""
    part = prepared(pool, accumulators)

    def total(offset: int, piece: np.ndarray) -> np.ndarray:
        whole = np.zeros(piece.size, np.int64)
        add_sum(whole, offset, *part)
        return whole.astype(np.float64)

    return total


def put(out: np.ndarray, base: np.ndarray, term: np.ndarray) -> None:
    """out = RN(base + RN(term)), and base where that term is zero."""
    small = term.astype(np.float32)
    np.copyto(out, np.where(small == 0, base, base + small))


def zeros(piece: np.ndarray) -> np.ndarray:
    return np.zeros(piece.size)


def wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def single(values: np.ndarray) -> np.ndarray:
    """float64 values rounded to float32."""
    return values.astype(np.float32).astype(np.float64)


root = np.sqrt
