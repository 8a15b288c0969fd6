"""Hadamard pools in torch operations, for any device: a dozen of them for 16 million parameters. Where Triton
has a kernel for the device, that does all of it in one pass (triton_tables.py).

Over such a pool every change of the weights is a table of K numbers: w_i = RN(base_i + r(i) T[h(i)]). A move
(k, s) has T[h] = RN(s) (-1)^popcount(h AND k), a replay T = RN(scale * WHT(A)). The signs r, a bit a
parameter, and the rotations behind h belong to the pool: they are drawn once and kept. Nothing is multiplied,
so nothing can be fused: a sign is flipped in the bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from types import ModuleType

import numpy as np
import torch

from fedtune.zeroth.philox import ROTATION, SHARED
from fedtune.zeroth.philox_torch import words
from fedtune.zeroth.pool import Piece, Pool, hadamard_row

TILE = 1 << 17  # parameters, on the CPU: temporaries of half a megabyte
LARGE = 1 << 24  # elsewhere, where starting an operation costs more than a million parameters do
HELD = 512  # tiles whose signs are kept: at most 1 GiB on a device, 8.6 billion parameters
NEGATIVE = -(1 << 31)  # the sign's bit of a float32
WORD = 32


def tile_of(device: torch.device) -> int:
    return TILE if device.type == "cpu" else LARGE


def tiles(offset: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Parts (first, last + 1) of `count` parameters from `offset`, none of which crosses a multiple of `size`
    in canonical order."""
    at = 0
    while at < count:
        end = min(count, at + size - (offset + at) % size)
        yield at, end
        at = end


@lru_cache(HELD)
def sign_words(key: int, number: int, size: int, device: torch.device) -> torch.Tensor:
    """The signs of tile `number`, bits of int32 (size / 32,)."""
    return words(key, SHARED, 0, number * size // WORD, size // WORD, device).to(torch.int32)


@cache
def shifts(device: torch.device) -> torch.Tensor:
    """What takes each bit of a word to its sign."""
    return torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=device)


def flips(pool: Pool, offset: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 (count,), NEGATIVE where r(i) is -1, else 0; of parameters of one tile."""
    size = tile_of(device)
    first = offset % size
    drawn = sign_words(pool.key, offset // size, size, device)[first // WORD : -(-(first + count) // WORD)]
    return (drawn[:, None] << shifts(device) & NEGATIVE).reshape(-1)[first % WORD :][:count]


@lru_cache(HELD)
def rotations(key: int, pool_size: int, number: int, size: int, device: torch.device) -> torch.Tensor:
    """c of the spans that tile `number` touches: int32, or int64 where a sum of places would leave that."""
    first, last = number * size // pool_size, ((number + 1) * size - 1) // pool_size
    kind = torch.int32 if 2 * pool_size + size < 1 << 31 else torch.int64
    return (words(key, ROTATION, 0, first, last - first + 1, device) & (pool_size - 1)).to(kind)


def rows(pool: Pool, offset: int, count: int, device: torch.device) -> torch.Tensor:
    """h(i) of parameters of one tile: (count,), of the type of `rotations`."""
    size = tile_of(device)
    number = offset // size
    turned = rotations(pool.key, pool.size, number, size, device)
    begin = offset - number * size // pool.size * pool.size
    at = torch.arange(begin, begin + count, dtype=turned.dtype, device=device)
    spans = at >> (pool.size.bit_length() - 1)
    return (at + turned.index_select(0, spans)) & (pool.size - 1)


def of_moves(pool: Pool, moves: Sequence[tuple[int, float]]) -> list[np.ndarray]:
    """The table of each move (k, step): float32 (K,)."""
    return [np.float32(step) * hadamard_row(pool.size, k) for k, step in moves]


class Onto:
    """Work: out = base + r(i) T[h(i)] for each table T, float32 (K,), in order; base where that term is zero.
    Summed in float32, whatever the types of out and base, and rounded to out's once."""

    def __init__(self, pool: Pool, tables: Sequence[np.ndarray]) -> None:
        self.pool, self.uploaded = pool, uploaded(tables)
        self.zeros = [bool((table == 0).any()) for table in tables]

    def __call__(self, out: torch.Tensor, base: torch.Tensor | None, offset: int) -> None:
        self.together([(out, base, offset)])

    def together(self, pieces: Sequence[Piece]) -> None:
        """Many tensors: those of one type on one device are one launch where there is a kernel."""
        alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Piece]] = {}
        for out, base, offset in pieces:
            if out.numel():
                kind = out.device, out.dtype, out.dtype if base is None else base.dtype
                alike.setdefault(kind, []).append((out, base, offset))
        for (device, *types), some in alike.items():
            tables = self.uploaded(device)
            if kernel := fused(self.pool.size, device, *types):
                kernel.onto(self.pool, tables, some)
                continue
            for out, base, offset in some:
                in_tiles(self.pool, tables, self.zeros, out, base, offset)


def in_tiles(
    pool: Pool,
    tables: torch.Tensor,
    zeros: Sequence[bool],
    out: torch.Tensor,
    base: torch.Tensor | None,
    offset: int,
) -> None:
    """The same, an operation after the other. zeros: which tables have some."""
    for at, end in tiles(offset, out.numel(), tile_of(out.device)):
        piece = out[at:end]
        sums = piece if piece.dtype == torch.float32 else torch.empty(end - at, device=out.device)
        first = (piece if base is None else base[at:end]).to(torch.float32)
        place = rows(pool, offset + at, end - at, out.device)
        flip = flips(pool, offset + at, end - at, out.device)
        for table, some in zip(tables, zeros, strict=True):
            term = (table.index_select(0, place).view(torch.int32) ^ flip).view(torch.float32)
            if some:
                sums.copy_(torch.where(term == 0, first, first + term))
            else:
                torch.add(first, term, out=sums)
            first = sums
        if sums is not piece:
            piece.copy_(sums)


FUSED_ON = "cuda"  # what Triton's kernel is compiled for


@cache
def fused(size: int, device: torch.device, out: torch.dtype, base: torch.dtype) -> ModuleType | None:
    """triton_tables, where it runs on this device and has the bits of torch's operations: it is tried once
    for pools of a size and for these types. None without Triton, or, after a warning, where it fails."""
    if device.type != FUSED_ON:
        return None
    try:
        from fedtune.zeroth import triton_tables
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    if size > triton_tables.LARGEST:
        return None
    try:
        why = "" if agrees(triton_tables, size, device, out, base) else "its bits differ"
    except Exception as error:  # no compiler, a card that is too old: torch has the same bits
        why = f"{type(error).__name__}: {str(error)[:200]}"
    if why:
        warnings.warn(f"passes over weights on {device} go without Triton ({why})", stacklevel=2)
    return None if why else triton_tables


def agrees(kernel: ModuleType, size: int, device: torch.device, out: torch.dtype, base: torch.dtype) -> bool:
    """Whether both ways end at the same bits: with a subnormal, both zeros, and a term of zero."""
    pool, offset = Pool(5, size), TILE - 3
    tables = torch.linspace(-1e-3, 1e-3, 2 * size + 1, device=device)[:-1].view(2, size).contiguous()
    first = torch.linspace(-1, 1, 301, device=device)
    first[:3] = torch.tensor([1e-41, 0.0, -0.0], device=device)
    first, results = first.to(base), [torch.empty(301, dtype=out, device=device) for _ in range(2)]
    kernel.onto(pool, tables, [(results[0], first, offset)])
    in_tiles(pool, tables, (True, True), results[1], first, offset)
    return bool(torch.equal(*(result.view(torch.uint8) for result in results)))


def uploaded(tables: Sequence[np.ndarray]) -> Callable[[torch.device], torch.Tensor]:
    """The tables on a device, once: (tables, K)."""
    return cache(lambda device: torch.from_numpy(np.stack(tables)).to(device))


def add_table(total: torch.Tensor, offset: int, pool: Pool, table: torch.Tensor) -> None:
    """total += r(i) table[h(i)]: int64."""
    device = total.device
    for at, end in tiles(offset, total.numel(), tile_of(device)):
        found = table.index_select(0, rows(pool, offset + at, end - at, device))
        total[at:end] += torch.where(flips(pool, offset + at, end - at, device) < 0, -found, found)


def gather(total: torch.Tensor, whole: torch.Tensor, offset: int, pool: Pool) -> None:
    """total[h(i)] += r(i) whole[i]: int64."""
    device = whole.device
    for at, end in tiles(offset, whole.numel(), tile_of(device)):
        part = whole[at:end]
        signed = torch.where(flips(pool, offset + at, end - at, device) < 0, -part, part)
        total.index_add_(0, rows(pool, offset + at, end - at, device), signed)
