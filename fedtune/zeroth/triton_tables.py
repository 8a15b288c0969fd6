"""Tables of a Hadamard pool in one pass over a GPU's memory, by one launch of a Triton kernel for all tensors
of a model: a replay, a perturbation, several moves.

    x = base;  for each table T:  x = RN(x + r(i) T[h(i)]);  out = x

Signs r, a bit a parameter, and rotations behind h, 4 bytes for K parameters, are drawn once and kept while
the pool is the latest one. Nothing is multiplied, a sign is flipped in the bits, so nothing can become a
multiply-add; the one operation on floats is an addition. tests/zeroth/test_triton.py looks for it in the
compiled code, and compares the interpreted kernel's bits with those of the CPU. It has not been run on a
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from fedtune.zeroth.philox import ROTATION, SHARED
from fedtune.zeroth.philox_torch import words
from fedtune.zeroth.pool import Piece, Pool

BLOCK = 1024  # parameters of a program; of a smaller pool its size, so that a program meets two spans at most
CHUNK = 1 << 16  # parameters of a row of the list of places, at most: 32 bytes for 64 programs
DRAWN = 1 << 26  # parameters whose signs are drawn at a time: 1/4 GiB of temporaries
LARGEST = 1 << 24  # directions of a pool; places in its table are int32
WORD = 32
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def onto(pool: Pool, tables: torch.Tensor, pieces: Sequence[Piece]) -> None:
    """out = base + r(i) T[h(i)] for each table T in order, and base where that term is zero; summed in
    float32, and rounded to out's type once.

    tables  float32 (tables, K), as the pieces on one CUDA device
    pieces  flat, each out of one type and each base of one: float32, bfloat16 or float16
    """
    out, base, _ = pieces[0]
    first = min(offset for _, _, offset in pieces) // pool.size * pool.size
    end = max(offset + out.numel() for out, _, offset in pieces)
    spots = tuple(
        (out.data_ptr(), (out if base is None else base).data_ptr(), offset - first, out.numel())
        for out, base, offset in pieces
    )
    block = min(BLOCK, pool.size)
    widths = out.element_size(), (out if base is None else base).element_size()
    places = listed(spots, widths, out.device)
    with torch.cuda.device_of(out):  # Triton starts on the current device
        add_tables[(len(places) * (CHUNK // block),)](
            places,
            *drawn(pool, first, end, out.device),
            tables,
            len(tables),
            OUT=TYPES[out.dtype],
            BASE=TYPES[(out if base is None else base).dtype],
            LOG_K=pool.size.bit_length() - 1,
            BLOCK=block,
            CHUNK=CHUNK,
            ALIGNED=all(to % 16 == 0 and start % 16 == 0 for to, start, _, _ in spots),
        )


@lru_cache(8)
def listed(
    spots: tuple[tuple[int, int, int, int], ...], widths: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Address of out, address of base, place in what was drawn, and number of parameters, of each chunk of
    each tensor: int64 (chunks, 4). widths: bytes of a parameter of out and of base."""
    rows = []
    for to, start, place, count in spots:
        at = np.arange(0, count, CHUNK)
        rows.append(
            np.stack(
                [to + widths[0] * at, start + widths[1] * at, place + at, np.minimum(CHUNK, count - at)], 1
            )
        )
    return torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device)


def drawn(pool: Pool, first: int, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of the signs from parameter `first` on, which begins a span, as far as the last program reads; c
    of the spans from there on, and of one more: int32."""
    held, where = latest(pool, device), (first, end)
    if where not in held:
        signs = torch.empty((end + BLOCK - first) // WORD + 1, dtype=torch.int32, device=device)
        for at in range(0, len(signs), DRAWN // WORD):
            part = signs[at : at + DRAWN // WORD]
            part.copy_(words(pool.key, SHARED, 0, first // WORD + at, len(part), device))
        spans = (end + BLOCK - first) // pool.size + 2
        turns = words(pool.key, ROTATION, 0, first // pool.size, spans, device) & (pool.size - 1)
        held[where] = signs, turns.to(torch.int32)
    return held[where]


@lru_cache(1)
def latest(pool: Pool, device: torch.device) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """What was drawn of one pool; of another one when that is asked for."""
    return {}


@triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator]
def add_tables(  # type: ignore[no-untyped-def]
    places,
    signs,
    turns,
    tables,
    number,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    LOG_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """places as `listed`, signs and turns as `drawn`; number of tables. BLOCK is a multiple of 32 and divides
    pool and chunk; ALIGNED: all addresses are multiples of 16."""
    row = places + (tl.program_id(0) // (CHUNK // BLOCK)).to(tl.int64) * 4
    begin = tl.program_id(0) % (CHUNK // BLOCK) * BLOCK
    left = tl.load(row + 3).to(tl.int32) - begin
    if left <= 0:
        return
    out = tl.load(row).to(tl.pointer_type(OUT))
    base = tl.load(row + 1).to(tl.pointer_type(BASE))
    if ALIGNED:
        out, base = tl.multiple_of(out, 16), tl.multiple_of(base, 16)
    place = tl.load(row + 2) + begin
    if left >= BLOCK:  # without a mask, and so 16 bytes at a time
        add_block(out + begin, base + begin, place, signs, turns, tables, number, left, LOG_K, BLOCK, False)
    else:
        add_block(out + begin, base + begin, place, signs, turns, tables, number, left, LOG_K, BLOCK, True)


@triton.jit  # type: ignore[untyped-decorator]
def add_block(  # type: ignore[no-untyped-def]
    out,
    base,
    place,
    signs,
    turns,
    tables,
    number,
    left,
    LOG_K: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    at = i + (place & 31).to(tl.int32)
    word = tl.load(signs + (place >> 5) + (at >> 5)).to(tl.uint32, bitcast=True)
    sign = (word << (31 - (at & 31)).to(tl.uint32)) & 0x80000000
    span = place >> LOG_K
    local = i + (place & ((1 << LOG_K) - 1)).to(tl.int32)
    turn = tl.where(local < (1 << LOG_K), tl.load(turns + span), tl.load(turns + span + 1))
    row = (local + turn) & ((1 << LOG_K) - 1)
    mask = i < left if MASKED else None
    x = tl.load(base + i, mask=mask).to(tl.float32)
    for m in range(number):
        term = tl.load(tables + m * (1 << LOG_K) + row).to(tl.uint32, bitcast=True) ^ sign
        x = tl.where((term << 1) != 0, x + term.to(tl.float32, bitcast=True), x)
    if out.dtype.element_ty == tl.bfloat16:  # to nearest, ties to even, as torch casts; the interpreter's own
        bits = x.to(tl.uint32, bitcast=True)  # cast cuts off
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = tl.where(x == x, upper, 0x7FC0).to(tl.uint16)
        tl.store(out + i, half.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(out + i, x.to(out.dtype.element_ty), mask=mask)
