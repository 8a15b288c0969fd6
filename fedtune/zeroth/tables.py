"""Hadamard pools in torch operations, for any device: a dozen of them for 16 million parameters.

Over such a pool every change of the weights is a table of K numbers: w_i = RN(base_i + r(i) T[h(i)]). A move
(k, s) has T[h] = RN(s) (-1)^popcount(h AND k), a replay T = RN(scale * WHT(A)). The signs r, a bit a
parameter, and the rotations behind h belong to the pool: they are drawn once and kept. Nothing is multiplied,
so nothing can be fused: a sign is flipped in the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache

import numpy as np
import torch

from fedtune.zeroth.philox import ROTATION, SHARED
from fedtune.zeroth.philox_torch import words
from fedtune.zeroth.pool import Pool, Work, parity

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
    places = np.arange(pool.size, dtype=np.uint64)
    return [
        np.where(parity(places, k), -np.float32(step), np.float32(step)).astype(np.float32)
        for k, step in moves
    ]


def onto(pool: Pool, tables: Sequence[np.ndarray]) -> Work:
    """out = base + r(i) T[h(i)] for each table T, float32 (K,), in order; base where that term is zero."""
    of = uploaded(tables)
    zeros = [bool((table == 0).any()) for table in tables]

    def work(out: torch.Tensor, base: torch.Tensor | None, offset: int) -> None:
        for at, end in tiles(offset, out.numel(), tile_of(out.device)):
            piece = out[at:end]
            first = piece if base is None else base[at:end]
            place = rows(pool, offset + at, end - at, out.device)
            flip = flips(pool, offset + at, end - at, out.device)
            for table, some in zip(of(out.device), zeros, strict=True):
                term = (table.index_select(0, place).view(torch.int32) ^ flip).view(torch.float32)
                if some:
                    piece.copy_(torch.where(term == 0, first, first + term))
                else:
                    torch.add(first, term, out=piece)
                first = piece

    return work


def uploaded(tables: Sequence[np.ndarray]) -> Callable[[torch.device], list[torch.Tensor]]:
    """The tables on a device, once."""
    return cache(lambda device: [torch.from_numpy(table).to(device) for table in tables])


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
