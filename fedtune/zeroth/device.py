"""The same as `cpu` in torch integer operations, tile by tile, for parameters on any device: the same bits,
without a compiler.

Each operation is a kernel of its own, so nothing is fused into a multiply-add. A device needs int64 and
float64 (CUDA has them, Apple's MPS has not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedtune.zeroth import normal, tables
from fedtune.zeroth.philox import BYTES, SIGNS
from fedtune.zeroth.philox_torch import words
from fedtune.zeroth.pool import Pool, Work, wht

LARGE = 1 << 22  # parameters at a time on a GPU, whose temporaries are 32 MB


def tile_of(device: torch.device) -> int:
    return tables.TILE if device.type == "cpu" else LARGE


def fields(
    key: int, family: int, stream: int, offset: int, count: int, width: int, device: torch.device
) -> torch.Tensor:
    """Bits (width 1) or bytes (width 8) of a stream, lowest of a word first: int64 (count,)."""
    each = 32 // width
    drawn = words(key, family, stream, offset // each, -(-(offset + count) // each) - offset // each, device)
    shifts = torch.arange(0, 32, width, device=device)
    return (drawn[:, None] >> shifts & ((1 << width) - 1)).reshape(-1)[offset % each :][:count]


def direction(pool: Pool, k: int, offset: int, count: int, device: torch.device) -> torch.Tensor:
    """As Pool.direction, of an independent pool: int64 (count,)."""
    if pool.directions == "gaussian":
        return torch.tensor(normal.TABLE.astype(np.int64), device=device)[
            fields(pool.key, BYTES, k, offset, count, 8, device)
        ]
    return 1 - 2 * fields(pool.key, SIGNS, k, offset, count, 1, device)


def along(pool: Pool, moves: Sequence[tuple[int, float]]) -> Work:
    """out = base + step * z_k, for each move (k, step) in order."""
    if pool.kind == "hadamard":
        return tables.Onto(pool, tables.of_moves(pool, moves))

    def work(out: torch.Tensor, base: torch.Tensor | None, offset: int) -> None:
        tile = tile_of(out.device)
        for at in range(0, out.numel(), tile):
            piece = out[at : at + tile]
            first = piece if base is None else base[at : at + tile]
            for k, step in moves:
                add(
                    piece, first, direction(pool, k, offset + at, piece.numel(), out.device), step * pool.unit
                )
                first = piece

    return work


def from_table(pool: Pool, table: np.ndarray) -> Work:
    """As cpu.from_table."""
    return tables.Onto(pool, [table])


def summed(sums: Sequence[tuple[Pool, np.ndarray]], scale: float) -> Work:
    """out = base + scale * S. sums: pools and int64 accumulators, checked."""
    factor = scale * sums[0][0].unit if sums else 0.0
    parts = [prepared(pool, accumulators) for pool, accumulators in sums]
    if len(sums) == 1 and sums[0][0].kind == "hadamard":
        table = (factor * wht(sums[0][1]).astype(np.float64)).astype(np.float32)
        return from_table(sums[0][0], table)

    def work(out: torch.Tensor, base: torch.Tensor | None, offset: int) -> None:
        tile, device = tile_of(out.device), out.device
        for at in range(0, out.numel(), tile):
            piece = out[at : at + tile]
            total = torch.zeros(piece.numel(), dtype=torch.int64, device=device)
            for add_part in parts:
                add_part(total, offset + at)
            add(piece, piece if base is None else base[at : at + tile], total, factor)

    return work


def prepared(pool: Pool, accumulators: np.ndarray) -> Callable[[torch.Tensor, int], None]:
    """What adds S of one pool to int64 numbers from an offset."""
    if pool.kind == "hadamard":
        of = tables.uploaded([wht(accumulators)])
        return lambda total, offset: tables.add_table(total, offset, pool, of(total.device)[0])

    def add_each(total: torch.Tensor, offset: int) -> None:
        for k in np.flatnonzero(accumulators):
            total += int(accumulators[k]) * direction(pool, int(k), offset, total.numel(), total.device)

    return add_each


def add(out: torch.Tensor, base: torch.Tensor, whole: torch.Tensor, factor: float) -> None:
    """out = RN(base + RN(factor * whole)), and base where that term is zero."""
    put(out, base, whole.to(torch.float64) * factor)


def put(out: torch.Tensor, base: torch.Tensor, term: torch.Tensor) -> None:
    """out = RN(base + RN(term)), and base where that term is zero."""
    small = term.to(torch.float32)
    out.copy_(torch.where(small == 0, base, base + small))


def gathered(pool: Pool, values: torch.Tensor, offset: int, factor: float) -> np.ndarray:
    """As cpu.gathered: int64 (K,)."""
    tile, device = tile_of(values.device), values.device
    total = torch.zeros(pool.size, dtype=torch.int64, device=device)
    for at in range(0, values.numel(), tile):
        whole = torch.round(values[at : at + tile].to(torch.float64) * factor).to(torch.int64)
        if pool.kind == "hadamard":
            tables.gather(total, whole, offset + at, pool)
        else:
            for k in range(pool.size):
                total[k] += (direction(pool, k, offset + at, whole.numel(), device) * whole).sum()
    found: np.ndarray = total.cpu().numpy()
    return found


# --- for curved.py ---

LENGTH = LARGE  # parameters at a time


def adder(pool: Pool, accumulators: np.ndarray) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """From an offset and a piece of parameters to their S: float64, exact."""
    add_part = prepared(pool, accumulators)

    def total(offset: int, piece: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(piece.numel(), dtype=torch.int64, device=piece.device)
        add_part(whole, offset)
        return whole.to(torch.float64)

    return total


def zeros(piece: torch.Tensor) -> torch.Tensor:
    return torch.zeros(piece.numel(), dtype=torch.float64, device=piece.device)


def wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float64)


def single(values: torch.Tensor) -> torch.Tensor:
    """float64 values rounded to float32."""
    return values.to(torch.float32).to(torch.float64)


root = torch.sqrt
