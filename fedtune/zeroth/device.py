"""The same as `cpu` in torch integer operations, tile by tile, for parameters on any device: the same bits,
without a compiler.

Each operation is a kernel of its own, so nothing is fused into a multiply-add. A device needs int64 and
float64 (CUDA has them, Apple's MPS has not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedtune.zeroth import normal
from fedtune.zeroth.philox import BYTES, LOW, M0, M1, ROTATION, ROUNDS, SHARED, SIGNS, W0, W1
from fedtune.zeroth.pool import Pool, Work, wht

TILE = 1 << 17  # parameters, on the CPU: temporaries of 1 MB
LARGE = 1 << 18  # elsewhere, where starting an operation costs more than doing it


def tile_of(device: torch.device) -> int:
    return TILE if device.type == "cpu" else LARGE


def words(key: int, family: int, stream: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """As philox.words: int64 (count,), each below 2**32. Products wrap around in int64, which leaves the 64
    bits that are wanted."""
    block = torch.arange(first // 4, -(-(first + count) // 4), dtype=torch.int64, device=device)
    c0, c1 = block & LOW, block >> 32
    c2, c3 = torch.full_like(block, stream), torch.full_like(block, family)
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> 32 & LOW) ^ c1 ^ k0, p1 & LOW, (p0 >> 32 & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return torch.stack([c0, c1, c2, c3], -1).reshape(-1)[first % 4 :][:count]


def fields(
    key: int, family: int, stream: int, offset: int, count: int, width: int, device: torch.device
) -> torch.Tensor:
    """Bits (width 1) or bytes (width 8) of a stream, lowest of a word first: int64 (count,)."""
    each = 32 // width
    drawn = words(key, family, stream, offset // each, -(-(offset + count) // each) - offset // each, device)
    shifts = torch.arange(0, 32, width, device=device)
    return (drawn[:, None] >> shifts & ((1 << width) - 1)).reshape(-1)[offset % each :][:count]


def places(pool: Pool, offset: int, count: int, device: torch.device) -> torch.Tensor:
    """As Pool.places: int64 (count,)."""
    at = torch.arange(offset, offset + count, device=device)
    span = at >> (pool.size.bit_length() - 1)
    first, last = offset // pool.size, (offset + count - 1) // pool.size
    return at + words(pool.key, ROTATION, 0, first, last - first + 1, device)[span - first] & (pool.size - 1)


def direction(pool: Pool, k: int, offset: int, count: int, device: torch.device) -> torch.Tensor:
    """As Pool.direction: int64 (count,)."""
    if pool.directions == "gaussian":
        return torch.tensor(normal.TABLE.astype(np.int64), device=device)[
            fields(pool.key, BYTES, k, offset, count, 8, device)
        ]
    if pool.kind == "independent":
        return 1 - 2 * fields(pool.key, SIGNS, k, offset, count, 1, device)
    parity = places(pool, offset, count, device) & k
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ parity >> shift
    return 1 - 2 * (fields(pool.key, SHARED, 0, offset, count, 1, device) ^ parity & 1)


def along(pool: Pool, moves: Sequence[tuple[int, float]]) -> Work:
    """out = base + step * z_k, for each move (k, step) in order."""

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


def summed(sums: Sequence[tuple[Pool, np.ndarray]], scale: float) -> Work:
    """out = base + scale * S. sums: pools and int64 accumulators, checked."""
    factor = scale * sums[0][0].unit if sums else 0.0
    tables = [wht(accumulators) if pool.kind == "hadamard" else accumulators for pool, accumulators in sums]

    def work(out: torch.Tensor, base: torch.Tensor | None, offset: int) -> None:
        tile, device = tile_of(out.device), out.device
        for at in range(0, out.numel(), tile):
            piece = out[at : at + tile]
            total = torch.zeros(piece.numel(), dtype=torch.int64, device=device)
            for (pool, _), table in zip(sums, tables, strict=True):
                add_sum(total, offset + at, pool, table)
            add(piece, piece if base is None else base[at : at + tile], total, factor)

    return work


def add_sum(total: torch.Tensor, offset: int, pool: Pool, table: np.ndarray) -> None:
    """total += S of one pool. table: the transform of a Hadamard pool's accumulators, or the accumulators."""
    count, device = total.numel(), total.device
    if pool.kind == "hadamard":
        sign = 1 - 2 * fields(pool.key, SHARED, 0, offset, count, 1, device)
        total += sign * torch.from_numpy(table).to(device)[places(pool, offset, count, device)]
        return
    for k in np.flatnonzero(table):
        total += int(table[k]) * direction(pool, int(k), offset, count, device)


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
            sign = 1 - 2 * fields(pool.key, SHARED, 0, offset + at, whole.numel(), 1, device)
            total.index_add_(0, places(pool, offset + at, whole.numel(), device), sign * whole)
        else:
            for k in range(pool.size):
                total[k] += (direction(pool, k, offset + at, whole.numel(), device) * whole).sum()
    found: np.ndarray = total.cpu().numpy()
    return found


# --- for curved.py
# ------------------------------------------------------------------------------------------------------

LENGTH = LARGE  # parameters at a time


def adder(pool: Pool, accumulators: np.ndarray) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """From an offset and a piece of parameters to their S: float64, exact."""
    table = wht(accumulators) if pool.kind == "hadamard" else accumulators

    def total(offset: int, piece: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(piece.numel(), dtype=torch.int64, device=piece.device)
        add_sum(whole, offset, pool, table)
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
