"""The lossless coder of integer levels: all tensors of a message as one flat int8 array, numpy and zlib only.

    pack(levels) = [head 13 bytes][gaps, deflated][signs, 1 bit each]      no level is above 1
                 | [head 13 bytes][levels, deflated]                       DENSE
                 | [PLANES][not 0][above 1][magnitudes, deflated][signs]   since version 2 of the format

Positions are the distances between the rarer of the two, levels that are 0 or levels that are not, a byte
each (255: add 255 and go on), through raw deflate in its Huffman-only mode. For independent levels that are
within 1 % of H2(p) + p bits a level at densities p of 5, 10 and 20 %, and exactly 1 bit where no level is 0.

Where levels exceed 1, "is it not 0" and, of those, "is it above 1" are a plane each (planes.py). A Huffman
code of whole levels, DENSE, pays at least a bit for each of them, so that a few magnitudes among many zeros
cost it a fifth more; for many levels of many magnitudes (int8, int4) it is as short and faster, and taken.
Version 1 had no planes, but magnitudes behind its gaps; they can still be read.

Equal levels are equal bytes wherever zlib is the same; another build of zlib may choose other codes, which
every one can read.
"""

from __future__ import annotations

import heapq
import math
import struct

import numpy as np
from numpy.typing import NDArray

from fedtune.wire.planes import (
    broken,
    deflate,
    gap_bytes,
    inflate,
    others,
    pack_plane,
    places_of,
    unpack_plane,
)

HEAD = struct.Struct("<BIII")  # road, marks, bytes of deflated gaps (or levels), bytes of deflated magnitudes
NONZEROS, ZEROS, DENSE, PLANES = range(4)  # which positions the gaps mark; every level; planes
SIZE = struct.Struct("<I")  # bytes of deflated magnitudes behind planes
EVEN = 0.4  # where no level is more frequent, a Huffman code of whole levels loses less than planes gain
WORTH = 1.01  # what is as short either way is dense, and read faster


def pack(levels: NDArray[np.int8]) -> bytes:
    """A flat int8 array of values -127..127 as bytes."""
    if levels.size and int(levels.min()) < -127:
        raise ValueError("a level of -128 has no opposite: levels are -127..127")
    held = levels != 0
    count, ones = int(np.count_nonzero(held)), int(np.count_nonzero(np.abs(levels) == 1))
    if count > ones and max(levels.size - count, ones) < EVEN * levels.size:
        return pack_dense(levels)
    values = levels[np.flatnonzero(held)] if count < levels.size else levels  # a mask is six times as slow
    negative = values < 0
    if count > ones:
        above = np.abs(values) > 1
        high = values[np.flatnonzero(above)]
        if dense_is_shorter(levels.size, high, count, int(np.count_nonzero(negative))):
            return pack_dense(levels)
        rest = (np.abs(high) - 2).astype(np.uint8)
        sizes = deflate(rest.tobytes()) if rest.any() else b""
        parts = pack_plane(held), pack_plane(above), SIZE.pack(len(sizes)), sizes
        return b"".join((bytes([PLANES]), *parts, np.packbits(negative).tobytes()))
    road = NONZEROS if 2 * count <= levels.size else ZEROS
    places = np.flatnonzero(held if road == NONZEROS else ~held)
    gaps = deflate(gap_bytes(places))
    return HEAD.pack(road, places.size, len(gaps), 0) + gaps + np.packbits(negative).tobytes()


def pack_dense(levels: NDArray[np.int8]) -> bytes:
    body = deflate(levels.tobytes())
    return HEAD.pack(DENSE, 0, len(body), 0) + body


def dense_is_shorter(size: int, high: NDArray[np.int8], count: int, negative: int) -> bool:
    """Whether a Huffman code of whole levels takes fewer bits than planes. high: the levels above 1;
    count and negative: how many of `size` are not 0, and below it."""
    zeros, ones = size - count, count - high.size
    tall = np.bincount(high.view(np.uint8), minlength=256)
    below = negative - int(tall[128:].sum())
    whole = huffman_bits([zeros, below, ones - below, *tall.tolist()])
    sizes = (tall[2:128] + tall[254:128:-1]).tolist()  # of 2, 3, ...
    third = huffman_bits(sizes) if any(sizes[1:]) else 0
    return whole < WORTH * (bits_of(count, size) + bits_of(high.size, count) + third + count)


def bits_of(marks: int, count: int) -> float:
    """Entropy of a plane of `count` places."""
    share = marks / count if count else 0.0
    if share in (0.0, 1.0):
        return 0.0
    return -count * (share * math.log2(share) + (1 - share) * math.log2(1 - share))


def huffman_bits(counts: list[int]) -> int:
    """Bits of the best prefix code for symbols that occur so often; one symbol alone takes a bit each."""
    heap = [count for count in counts if count]
    if len(heap) < 2:
        return sum(heap)
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, pair)
        total += pair
    return total


def version_of(data: bytes | memoryview) -> int:
    """The first version of the message format whose readers know this form."""
    return 2 if data[:1] == bytes([PLANES]) else 1


def unpack(data: bytes | memoryview, count: int) -> NDArray[np.int8]:
    """The `count` levels in `data`. Raises W601; allocates no more than `count` and the length of `data`
    warrant."""
    if data[:1] == bytes([PLANES]):
        return unpack_planes(memoryview(data)[1:], count)
    if len(data) < HEAD.size:
        raise broken("no room for the head of the levels")
    road, marks, first, second = HEAD.unpack_from(data)
    if road > DENSE or marks > count or HEAD.size + first + second > len(data):
        raise broken("a head of the levels that does not fit them")
    body = memoryview(data)[HEAD.size :]
    if road == DENSE:
        if marks or second or len(body) != first:
            raise broken("dense levels with parts that they do not have")
        levels = np.frombuffer(inflate(body, count), np.int8)
        if levels.size != count or (count and int(levels.min()) < -127):
            raise broken(f"{levels.size} dense levels")
        return levels
    places = places_of(inflate(body[:first], marks + count // 255), marks, count)
    kept = marks if road == NONZEROS else count - marks
    values = signs_of(body[first + second :], kept)
    if second:
        sizes = np.frombuffer(inflate(body[first : first + second], kept), np.uint8)
        if sizes.size != kept or (kept and int(sizes.max()) > 126):
            raise broken("magnitudes that do not fit their levels")
        values *= (sizes + 1).view(np.int8)
    if road == ZEROS and not marks:
        return values
    levels = np.zeros(count, np.int8)
    levels[places if road == NONZEROS else others(places, count)] = values
    return levels


def unpack_planes(data: memoryview, count: int) -> NDArray[np.int8]:
    """The `count` levels in the planes that begin `data`."""
    held, data = unpack_plane(data, count)
    above, data = unpack_plane(data, held.size)
    if len(data) < SIZE.size:
        raise broken("no room for the length of magnitudes")
    end = SIZE.size + SIZE.unpack_from(data)[0]
    values, times = signs_of(data[end:], held.size), np.full(above.size, 2, np.int8)
    if end > SIZE.size:  # nothing lies here where no level is above 2
        sizes = np.frombuffer(inflate(data[SIZE.size : end], above.size), np.uint8)
        if sizes.size != above.size or not 1 <= int(sizes.max(initial=0)) <= 125:
            raise broken("magnitudes that do not fit their levels")
        times = (sizes + 2).view(np.int8)
    values[above] *= times
    levels = np.zeros(count, np.int8)
    levels[held] = values
    return levels


def signs_of(data: memoryview, kept: int) -> NDArray[np.int8]:
    """`kept` numbers 1 or -1 from a bit each."""
    signs = np.frombuffer(data, np.uint8)
    if signs.size != (kept + 7) // 8 or (kept % 8 and int(signs[-1]) & (0xFF >> kept % 8)):
        raise broken(f"{signs.size} bytes of signs for {kept} levels")
    values = np.unpackbits(signs, count=kept).view(np.int8)
    values *= -2
    values += 1
    return values
