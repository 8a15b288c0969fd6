"""What `pool` says in numpy, compiled for this CPU: each kernel works on a slice of the flat order, from any
offset, in tiles that stay in the cache.

Compiled once, when this module is imported, and kept by numba beside this file, or in the user's cache where
that folder cannot be written; nothing is
compiled later, because every kernel has one signature. Floating point is IEEE: no reordering, no fused
multiply-add.

Three things make LLVM vectorise the inner loops, and the speed depends on them. Indices are unsigned, because
numba tests signed ones for being negative
and the access is then no longer a plain stride. What works in place has an entry of its own, because LLVM
takes another way where two arrays overlap.
And a loop over exactly 32 must have a long body, or it is unrolled before it is vectorised; a short one has
bounds that LLVM does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedtune.extras import missing
from fedtune.zeroth import philox
from fedtune.zeroth.philox import BYTES, ROTATION, SHARED, SIGNS

try:
    from numba import njit, types, uint32, uint64
except ModuleNotFoundError as error:
    if error.name != "numba":
        raise
    raise missing("numba", "zeroth", "method.type = 'fedkseed'") from None

TILE = 4096  # parameters: 512 bytes of signs, 16 KB of float32
WORDS = TILE // 32  # of signs; direction bytes take 32 bits for 4 parameters

M0, M1 = np.uint64(philox.M0), np.uint64(philox.M1)
W0, W1 = np.uint32(philox.W0), np.uint32(philox.W1)
HALF, FIVE, FIVES = np.uint64(32), np.uint64(5), np.uint64(31)
ROUNDS = philox.ROUNDS
ONE, TOP = np.uint32(1), np.uint32(31)

Code = Callable[..., Any]


def compiled(*signature: Any, inline: str = "never") -> Callable[[Code], Code]:
    """njit for one signature (none: wherever it is called), cached if numba finds a folder that can be
    written, and without the interpreter's lock."""

    def compile_it(code: Code) -> Code:
        options = {"nogil": True, "error_model": "numpy", "inline": inline}
        try:
            return njit(*signature, cache=True, **options)(code)  # type: ignore[no-any-return]
        except (
            RuntimeError
        ):  # "cannot cache function": a read-only package and no home; costs seconds at each start
            return njit(*signature, **options)(code)  # type: ignore[no-any-return]

    return compile_it


def flat(dtype: Any, readonly: bool = False, of: int = 1) -> Any:
    return types.Array(dtype, of, "C", readonly=readonly)


@compiled(inline="always")
def block(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in range(ROUNDS):
        p0 = M0 * uint64(c0)
        p1 = M1 * uint64(c2)
        c0, c1, c2, c3 = uint32(p1 >> HALF) ^ c1 ^ k0, uint32(p1), uint32(p0 >> HALF) ^ c3 ^ k1, uint32(p0)
        k0 = uint32(k0 + W0)
        k1 = uint32(k1 + W1)
    return c0, c1, c2, c3


@compiled(types.void(flat(types.uint32), types.uint64, types.uint64, types.uint32, types.uint64))
def fill(out, first, stream, family, key):  # type: ignore[no-untyped-def]
    """Words of a stream from block `first`: out (4 * blocks,)."""
    for j in range(out.size >> 2):
        at = first + uint64(j)
        a, b, c, d = block(
            uint32(at), uint32(at >> HALF), uint32(stream), uint32(family), uint32(key), uint32(key >> HALF)
        )
        out[4 * j] = a
        out[4 * j + 1] = b
        out[4 * j + 2] = c
        out[4 * j + 3] = d


@compiled(types.void(flat(types.uint64), flat(types.uint32), types.int64, types.int64, types.uint64))
def rows(out, drawn, tile, size, key):  # type: ignore[no-untyped-def]
    """h of the first parameter of each word of a tile: out (WORDS,); the 31 after it follow in order, in a
    table that is continued by 31 rows."""
    shift = 0
    while (1 << shift) < size:
        shift += 1
    first = (tile >> shift) >> 2 << 2  # a span whose number begins a block
    count = ((tile + TILE - 1) >> shift) - first + 1
    fill(drawn[: (count + 3) >> 2 << 2], uint64(first >> 2), uint64(0), uint32(ROTATION), key)
    last = uint64(size - 1)
    if size >= TILE:  # one span: most of the time that is spent here is saved
        start = uint64(tile) + uint64(drawn[(tile >> shift) - first])
        for w in range(out.size):
            out[uint64(w)] = (start + uint64(32 * w)) & last
        return
    for w in range(out.size):
        at = uint64(tile + 32 * w)
        out[uint64(w)] = (at + uint64(drawn[(at >> uint64(shift)) - uint64(first)])) & last


@compiled(types.int64(types.int64))
def spans(size):  # type: ignore[no-untyped-def]
    """Words that `rows` draws at most."""
    return (TILE // size + 12) >> 2 << 2


@compiled(types.void(flat(types.int64)))
def wht(values):  # type: ignore[no-untyped-def]
    """Walsh-Hadamard transform in place, natural order."""
    half = 1
    while half < values.size:
        for start in range(0, values.size, 2 * half):
            for j in range(start, start + half):
                a = values[uint64(j)]
                b = values[uint64(j + half)]
                values[uint64(j)] = a + b
                values[uint64(j + half)] = a - b
        half *= 2


@compiled(inline="always")
def signed(value, word, b):  # type: ignore[no-untyped-def]
    """The bits of a float32, negative where bit b of a word says so."""
    return uint32(value ^ uint32(uint32(word >> uint32(b)) << TOP))


@compiled(inline="always")
def moved(x, term):  # type: ignore[no-untyped-def]
    """x plus a term given as bits; a term of zero, of either sign, leaves even a zero's sign."""
    return x + np.uint32(term).view(np.float32) if uint32(term << ONE) != 0 else x


@compiled(inline="always")
def table_loop(out, base, offset, table, key):  # type: ignore[no-untyped-def]
    size = table.size - 32
    words, first, drawn = (
        np.empty(WORDS, np.uint32),
        np.empty(WORDS, np.uint64),
        np.empty(spans(size), np.uint32),
    )
    end = offset + out.size
    for tile in range(offset // TILE * TILE, end, TILE):
        fill(words, uint64(tile >> 7), uint64(0), uint32(SHARED), key)
        rows(first, drawn, tile, size, key)
        for w in range(WORDS):
            start, row, word = tile + 32 * w, first[w], words[w]
            p = uint64(start - offset)
            low, high = max(offset - start, 0), min(end - start, 32)
            if high - low == 32:
                for b in range(32):
                    out[p + uint64(b)] = moved(base[p + uint64(b)], signed(table[row + uint64(b)], word, b))
            else:
                for b in range(low, high):
                    out[p + uint64(b)] = moved(base[p + uint64(b)], signed(table[row + uint64(b)], word, b))


TABLE = (types.int64, flat(types.uint32), types.uint64)


@compiled(types.void(flat(types.float32), flat(types.float32, True), *TABLE))
def table_from(out, base, offset, table, key):  # type: ignore[no-untyped-def]
    """out = base + sign(i) * table[h(i)]. table: bits of float32, (K + 32,), its last 32 being its first.
    base and out may not overlap."""
    table_loop(out, base, offset, table, key)


@compiled(types.void(flat(types.float32), *TABLE))
def table_onto(out, offset, table, key):  # type: ignore[no-untyped-def]
    """out += sign(i) * table[h(i)]."""
    table_loop(out, out, offset, table, key)


@compiled(
    types.void(
        flat(types.float32),
        types.int64,
        flat(types.uint32),
        flat(types.uint32, of=2),
        flat(types.uint64),
        types.uint32,
        types.uint64,
    )
)
def steps_onto(out, offset, steps, flips, streams, family, key):  # type: ignore[no-untyped-def]
    """out += sign(i) * step, negative where bit h(i) of `flips` is set; for one step after the other, while a
    tile is in the cache.

    steps: bits of float32 (steps,); flips: (steps, K / 32 + 1), the last word of each its first; streams:
    (steps,), of the signs.
    """
    size = 32 * (flips.shape[1] - 1)
    words, first, drawn = (
        np.empty(WORDS, np.uint32),
        np.empty(WORDS, np.uint64),
        np.empty(spans(size), np.uint32),
    )
    end = offset + out.size
    for tile in range(offset // TILE * TILE, end, TILE):
        rows(first, drawn, tile, size, key)
        for s in range(steps.size):
            step, flip = steps[s], flips[s]
            fill(words, uint64(tile >> 7), streams[s], family, key)
            for w in range(WORDS):
                start, row = tile + 32 * w, first[w]
                both = uint64(flip[row >> FIVE]) | uint64(flip[(row >> FIVE) + ONE]) << HALF
                word = uint32(words[w] ^ uint32(both >> (row & FIVES)))
                p = uint64(start - offset)
                for b in range(max(offset - start, 0), min(end - start, 32)):
                    out[p + uint64(b)] = moved(out[p + uint64(b)], signed(step, word, b))


@compiled(types.void(flat(types.float32), types.int64, flat(types.float32), types.uint64, types.uint64))
def add_bytes(out, offset, table, stream, key):  # type: ignore[no-untyped-def]
    """out += table[byte(i)] of one stream. table: float32 (256,)."""
    words = np.empty(TILE // 4, np.uint32)
    end = offset + out.size
    for tile in range(offset // TILE * TILE, end, TILE):
        fill(words, uint64(tile >> 4), stream, uint32(BYTES), key)
        for i in range(max(tile, offset), min(tile + TILE, end)):
            term = table[uint64(uint32(words[uint64((i - tile) >> 2)] >> uint32(8 * (i & 3))) & uint32(255))]
            if term != 0:
                out[uint64(i - offset)] += term


@compiled(types.void(flat(types.int64), types.int64, flat(types.int64), types.uint64))
def sum_table(out, offset, table, key):  # type: ignore[no-untyped-def]
    """out += sign(i) * table[h(i)], in whole numbers. table: int64 (K + 32,), its last 32 being its first."""
    size = table.size - 32
    words, first, drawn = (
        np.empty(WORDS, np.uint32),
        np.empty(WORDS, np.uint64),
        np.empty(spans(size), np.uint32),
    )
    end = offset + out.size
    for tile in range(offset // TILE * TILE, end, TILE):
        fill(words, uint64(tile >> 7), uint64(0), uint32(SHARED), key)
        rows(first, drawn, tile, size, key)
        for w in range(WORDS):
            start, row, word = tile + 32 * w, first[w], words[w]
            p = uint64(start - offset)
            for b in range(max(offset - start, 0), min(end - start, 32)):
                minus = -np.int64(uint32(word >> uint32(b)) & ONE)
                out[p + uint64(b)] += (table[row + uint64(b)] ^ minus) - minus


@compiled(types.void(flat(types.int64), types.int64, flat(types.uint64), flat(types.int64), types.uint64))
def sum_signs(out, offset, streams, scalars, key):  # type: ignore[no-untyped-def]
    """out += sum over streams of scalar * sign(i). Four streams at a time: their number must be a multiple of
    4."""
    words, part = np.empty((4, WORDS), np.uint32), np.empty(TILE, np.int64)
    end = offset + out.size
    for tile in range(offset // TILE * TILE, end, TILE):
        part[:] = scalars.sum()
        for s in range(0, streams.size, 4):
            for q in range(4):
                fill(words[q], uint64(tile >> 7), streams[s + q], uint32(SIGNS), key)
            a0, a1, a2, a3 = 2 * scalars[s], 2 * scalars[s + 1], 2 * scalars[s + 2], 2 * scalars[s + 3]
            for w in range(WORDS):
                p, w0, w1, w2, w3 = uint64(32 * w), words[0, w], words[1, w], words[2, w], words[3, w]
                for b in range(32):
                    bit = uint32(ONE << uint32(b))
                    total = part[p + uint64(b)]
                    total = total - (a0 if uint32(w0 & bit) != 0 else 0)
                    total = total - (a1 if uint32(w1 & bit) != 0 else 0)
                    total = total - (a2 if uint32(w2 & bit) != 0 else 0)
                    part[p + uint64(b)] = total - (a3 if uint32(w3 & bit) != 0 else 0)
        for i in range(max(tile, offset), min(tile + TILE, end)):
            out[uint64(i - offset)] += part[uint64(i - tile)]


@compiled(
    types.void(
        flat(types.int64), types.int64, flat(types.uint64), flat(types.int64), flat(types.int64), types.uint64
    )
)
def sum_bytes(out, offset, streams, scalars, table, key):  # type: ignore[no-untyped-def]
    """out += sum over streams of scalar * table[byte(i)]."""
    words = np.empty(TILE // 4, np.uint32)
    end = offset + out.size
    for tile in range(offset // TILE * TILE, end, TILE):
        for s in range(streams.size):
            fill(words, uint64(tile >> 4), streams[s], uint32(BYTES), key)
            for i in range(max(tile, offset), min(tile + TILE, end)):
                byte = uint32(words[uint64((i - tile) >> 2)] >> uint32(8 * (i & 3))) & uint32(255)
                out[uint64(i - offset)] += scalars[s] * table[uint64(byte)]


@compiled(types.void(flat(types.float32), flat(types.int64), types.float64))
def add_whole(out, sums, scale):  # type: ignore[no-untyped-def]
    """out += RN(scale * sums)."""
    for i in range(out.size):
        term = np.float32(np.float64(sums[i]) * scale)
        if term != 0:
            out[i] += term


@compiled(types.void(flat(types.int64), flat(types.float32, True), types.float64))
def nearest(out, values, factor):  # type: ignore[no-untyped-def]
    """Nearest whole numbers of factor * value, half to even; the factor is a power of two, so the product is
    exact."""
    for i in range(out.size):
        out[i] = np.int64(np.rint(np.float64(values[i]) * factor))


@compiled(types.void(flat(types.int64), flat(types.int64, True), types.int64, types.uint64))
def gather_table(out, values, offset, key):  # type: ignore[no-untyped-def]
    """out[h(i)] += sign(i) * values[i]: the transpose of `sum_table`. out: (K + 32,), whose last 32 belong to
    the first."""
    size = out.size - 32
    words, first, drawn = (
        np.empty(WORDS, np.uint32),
        np.empty(WORDS, np.uint64),
        np.empty(spans(size), np.uint32),
    )
    end = offset + values.size
    for tile in range(offset // TILE * TILE, end, TILE):
        fill(words, uint64(tile >> 7), uint64(0), uint32(SHARED), key)
        rows(first, drawn, tile, size, key)
        for w in range(WORDS):
            start, row, word = tile + 32 * w, first[w], words[w]
            p = uint64(start - offset)
            for b in range(max(offset - start, 0), min(end - start, 32)):
                minus = -np.int64(uint32(word >> uint32(b)) & ONE)
                out[row + uint64(b)] += (values[p + uint64(b)] ^ minus) - minus


@compiled(types.void(flat(types.int64), flat(types.int64, True), types.int64, types.uint64))
def gather_signs(out, values, offset, key):  # type: ignore[no-untyped-def]
    """out[k] += sum of sign_k(i) * values[i] for every stream k. Four streams at a time: their number must be
    a multiple of 4."""
    words, part = np.empty((4, WORDS), np.uint32), np.empty(TILE, np.int64)
    end = offset + values.size
    for tile in range(offset // TILE * TILE, end, TILE):
        low, high = max(tile, offset), min(tile + TILE, end)
        part[:] = 0
        part[low - tile : high - tile] = values[low - offset : high - offset]
        whole = part.sum()
        for k in range(0, out.size, 4):
            for q in range(4):
                fill(words[q], uint64(tile >> 7), uint64(k + q), uint32(SIGNS), key)
            t0, t1, t2, t3 = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            for w in range(WORDS):
                p, w0, w1, w2, w3 = uint64(32 * w), words[0, w], words[1, w], words[2, w], words[3, w]
                for b in range(32):
                    bit, value = uint32(ONE << uint32(b)), part[p + uint64(b)]
                    t0 += value if uint32(w0 & bit) != 0 else 0
                    t1 += value if uint32(w1 & bit) != 0 else 0
                    t2 += value if uint32(w2 & bit) != 0 else 0
                    t3 += value if uint32(w3 & bit) != 0 else 0
            for q, total in enumerate((t0, t1, t2, t3)):
                out[k + q] += whole - 2 * total


@compiled(
    types.void(flat(types.int64), flat(types.int64, True), types.int64, flat(types.int64), types.uint64)
)
def gather_bytes(out, values, offset, table, key):  # type: ignore[no-untyped-def]
    """out[k] += sum of table[byte_k(i)] * values[i], for every stream k."""
    words = np.empty(TILE // 4, np.uint32)
    end = offset + values.size
    for tile in range(offset // TILE * TILE, end, TILE):
        for k in range(out.size):
            fill(words, uint64(tile >> 4), uint64(k), uint32(BYTES), key)
            total = np.int64(0)
            for i in range(max(tile, offset), min(tile + TILE, end)):
                byte = uint32(words[uint64((i - tile) >> 2)] >> uint32(8 * (i & 3))) & uint32(255)
                total += table[uint64(byte)] * values[uint64(i - offset)]
            out[k] += total
