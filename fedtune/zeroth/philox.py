"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11): random words that
are a function of key and counter.

There is no state: the words of any parameter can be drawn alone, in any order, by any device with 32-bit
integers. It is no cipher: never for secrets.

A pool's counter is (block low, block high, stream, family) and its key is the pool's; a block is four words.
"""

from __future__ import annotations

import numpy as np

# Multipliers and key increments of Random123.
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF

# Families: what a word is for. Streams within a family are numbered by the direction, or 0.
SHARED, ROTATION, SIGNS, BYTES = 0, 1, 2, 3


def philox(counter: tuple[np.ndarray | int, ...], key: int) -> np.ndarray:
    """Words of counters (c0, c1, c2, c3), each a number or (blocks,): uint32 (blocks, 4)."""
    low, c0, c1, c2, c3 = np.broadcast_arrays(np.uint64(LOW), *(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(M0) * c0, np.uint64(M1) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def words(key: int, family: int, stream: int, first: int, count: int) -> np.ndarray:
    """`count` words of one stream from word `first`: uint32 (count,)."""
    block = np.arange(first // 4, -(-(first + count) // 4), dtype=np.uint64)
    drawn = philox((block & np.uint64(LOW), block >> np.uint64(32), stream, family), key)
    return drawn.reshape(-1)[first % 4 :][:count]


def bits(key: int, family: int, stream: int, first: int, count: int) -> np.ndarray:
    """`count` bits from bit `first`, lowest bit of a word first: uint8 (count,)."""
    drawn = words(key, family, stream, first // 32, -(-(first + count) // 32) - first // 32)
    return np.unpackbits(drawn.astype("<u4").view(np.uint8), bitorder="little")[first % 32 :][:count]
