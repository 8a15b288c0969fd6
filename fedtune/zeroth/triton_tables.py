"""Tables of a Hadamard pool in one pass over a GPU's memory, by one Triton kernel: a replay, a perturbation,
several moves.

    x = base;  for each table T:  x = RN(x + r(i) T[h(i)]);  out = x

Signs r, a bit a parameter, and rotations behind h, 4 bytes for K parameters, are drawn once for each piece
of a tensor and kept while the pool is the latest one. Nothing is multiplied, a sign is flipped in the bits,
so nothing can become a multiply-add; the one operation on floats is an addition. tests/zeroth/test_triton.py
looks for it in the compiled code, and compares the interpreted kernel's bits with those of the CPU. It has
not been run on a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fedtune.zeroth.philox import ROTATION, SHARED
from fedtune.zeroth.philox_torch import words
from fedtune.zeroth.pool import Pool

BLOCK = 1024  # parameters of a program; of a smaller pool its size, so that a program meets two spans at most
PIECE = 1 << 26  # parameters of a launch, whose places are int32; 8 MiB of signs
LARGEST = 1 << 24  # directions of a pool, for the same reason
WORD = 32

Drawn = tuple[torch.Tensor, torch.Tensor]  # words of signs and rotations, int32


def onto(pool: Pool, tables: torch.Tensor, out: torch.Tensor, base: torch.Tensor | None, offset: int) -> None:
    """out = base + r(i) T[h(i)] for each table T in order, and base where that term is zero; summed in
    float32, and rounded to out's type once.

    tables  float32 (tables, K), as the others on a CUDA device
    out     and base: flat, float32, bfloat16 or float16
    """
    block = min(BLOCK, pool.size)
    with torch.cuda.device_of(out):  # Triton starts on the current device
        # from the tensor's own beginning: in canonical order most pieces would begin where no wide access can
        for at in range(0, out.numel(), PIECE):
            piece = out[at : at + PIECE]
            count = piece.numel()
            add_tables[(triton.cdiv(count, block),)](
                piece,
                piece if base is None else base[at : at + count],
                *drawn(pool, offset + at, count, out.device),
                tables,
                len(tables),
                (offset + at) % WORD,
                (offset + at) % pool.size,
                count,
                LOG_K=pool.size.bit_length() - 1,
                BLOCK=block,
            )


def drawn(pool: Pool, offset: int, count: int, device: torch.device) -> Drawn:
    """Words of the signs from that of `offset` on, as far as the last program reads; c of the spans from that
    of `offset` on, and of one more."""
    held, where = latest(pool, device), (offset, count)
    if where not in held:
        end = offset + count + BLOCK
        first, last = offset // WORD, end // WORD
        signs = words(pool.key, SHARED, 0, first, last - first + 1, device)
        first, last = offset // pool.size, end // pool.size
        turns = words(pool.key, ROTATION, 0, first, last - first + 2, device) & (pool.size - 1)
        held[where] = signs.to(torch.int32), turns.to(torch.int32)
    return held[where]


@lru_cache(1)
def latest(pool: Pool, device: torch.device) -> dict[tuple[int, int], Drawn]:
    """What was drawn of one pool; of another one when that is asked for."""
    return {}


@triton.jit(do_not_specialize=["number", "shift", "inside"])  # type: ignore[untyped-decorator]
def add_tables(  # type: ignore[no-untyped-def]
    out, base, signs, turns, tables, number, shift, inside, count, LOG_K: tl.constexpr, BLOCK: tl.constexpr
):
    """signs, turns as `drawn`; number of tables; shift, inside: places of the first parameter in its word and
    in its span. BLOCK is a multiple of 32 and divides the pool."""
    begin = tl.program_id(0) * BLOCK
    i = tl.arange(0, BLOCK)
    mine = begin + i < count
    at = i + shift
    word = tl.load(signs + begin // 32 + (at >> 5)).to(tl.uint32, bitcast=True)
    sign = (word << (31 - (at & 31)).to(tl.uint32)) & 0x80000000
    span = (begin + inside) >> LOG_K
    local = i + ((begin + inside) & ((1 << LOG_K) - 1))
    turn = tl.where(local < (1 << LOG_K), tl.load(turns + span), tl.load(turns + span + 1))
    row = (local + turn) & ((1 << LOG_K) - 1)
    x = tl.load(base + begin + i, mask=mine, other=0).to(tl.float32)
    for m in range(number):
        term = tl.load(tables + m * (1 << LOG_K) + row).to(tl.uint32, bitcast=True) ^ sign
        x = tl.where((term << 1) != 0, x + term.to(tl.float32, bitcast=True), x)
    if out.dtype.element_ty == tl.bfloat16:  # to nearest, ties to even, as torch casts; the interpreter's own
        bits = x.to(tl.uint32, bitcast=True)  # cast cuts off
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = tl.where(x == x, upper, 0x7FC0).to(tl.uint16)
        tl.store(out + begin + i, half.to(tl.bfloat16, bitcast=True), mask=mine)
    else:
        tl.store(out + begin + i, x.to(out.dtype.element_ty), mask=mine)
