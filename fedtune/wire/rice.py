"""Rice codes (Golomb 1966; Rice 1979): whole numbers that are mostly small in about as many bits as they
need, numpy only.

    pack(values) = [b, 1 byte][bytes of the quotients, base 128][quotients, unary][remainders, b bits each]

A value is q * 2**b + r: q zeros and a one, then r. b is chosen so that the whole is shortest. Equal values
are equal bytes on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.wire.frame import damaged, to_varint, varint

WIDEST = 63  # bits of a remainder


def pack(values: NDArray[np.uint64]) -> bytes:
    """Values below 2**63 (n,) as bytes."""
    if not values.size:
        return b""
    width = narrowest(values)
    quotients = (values >> np.uint64(width)).astype(np.int64)
    unary = np.zeros(int(quotients.sum()) + values.size, np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    first = np.packbits(unary, bitorder="little").tobytes()
    rest = (
        np.unpackbits(
            values.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, count=width, bitorder="little"
        )
        if width
        else unary[:0]
    )
    return (
        bytes([width])
        + to_varint(len(first))
        + first
        + np.packbits(rest.reshape(-1), bitorder="little").tobytes()
    )


def narrowest(values: NDArray[np.uint64]) -> int:
    """The b whose code is shortest; the first of equals."""
    middle = int(values.mean(dtype=np.float64)).bit_length()
    tried = range(max(middle - 3, 0), min(middle + 2, WIDEST) + 1)
    return min(
        tried, key=lambda b: float(values.size * b) + float((values >> np.uint64(b)).sum(dtype=np.float64))
    )


def unpack(data: bytes, at: int, count: int) -> tuple[NDArray[np.uint64], int]:
    """`count` values from byte `at` of `data`, and where they end. Raises W601; allocates no more than
    `count` and the length of `data` warrant."""
    if not count:
        return np.zeros(0, np.uint64), at
    if at >= len(data) or data[at] > WIDEST:
        raise damaged("a Rice code without its width")
    width = data[at]
    size, at = varint(data, at + 1)
    end = at + size + (count * width + 7) // 8
    if end > len(data) or 8 * size < count:
        raise damaged(f"{len(data) - at} bytes of a Rice code where {end - at} belong")
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8, size, at), bitorder="little"))
    if ones.size != count or int(ones[-1]) < 8 * size - 8:
        raise damaged(f"{ones.size} numbers in a Rice code of {count}")
    quotients = np.diff(ones, prepend=-1) - 1
    if int(quotients.max()).bit_length() + width > WIDEST:
        raise damaged("a number of more than 63 bits")
    bits = np.unpackbits(
        np.frombuffer(data, np.uint8, end - at - size, at + size), count=count * width, bitorder="little"
    )
    rest = np.zeros((count, 8), np.uint8)
    if width:
        low = np.packbits(bits.reshape(count, width), axis=1, bitorder="little")
        rest[:, : low.shape[1]] = low
    return (quotients.astype(np.uint64) << np.uint64(width)) | rest.view("<u8").reshape(-1).astype(
        np.uint64
    ), end
