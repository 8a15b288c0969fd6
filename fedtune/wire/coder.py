"""The lossless coder of integer levels: all tensors of a message as one flat int8 array, numpy and zlib only.

    pack(levels) = [head 13 bytes][gaps, deflated][magnitudes, deflated][signs, 1 bit each]

Positions are the distances between the rarer of the two, levels that are 0 or levels that are not, a byte
each (255: add 255
and go on), through raw deflate in its Huffman-only mode. For independent levels that are within 1 % of H2(p)
+ p bits a level
at densities p of 5, 10 and 20 %, and exactly 1 bit where no level is 0. Magnitudes follow only where one is
above 1. Many
levels of many magnitudes (int8, int4) take the dense road: every level a byte, Huffman-only.

Equal levels are equal bytes wherever zlib is the same; another build of zlib may choose other codes, which
every one can read.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import Refused
from fedtune.wire.frame import refuse

HEAD = struct.Struct("<BIII")  # road, marks, bytes of deflated gaps (or levels), bytes of deflated magnitudes
NONZEROS, ZEROS, DENSE = 0, 1, 2  # which positions the gaps mark
DENSE_SHARE = 0.3  # above it, with magnitudes, a byte a level is as small as gaps and three times as fast


def pack(levels: NDArray[np.int8]) -> bytes:
    """A flat int8 array of values -127..127 as bytes."""
    if levels.size and int(levels.min()) < -127:
        raise ValueError("a level of -128 has no opposite: levels are -127..127")
    held = levels != 0
    count = int(np.count_nonzero(held))
    values = levels[held] if count < levels.size else levels
    steep = bool(count) and (int(values.max()) > 1 or int(values.min()) < -1)
    if steep and count > DENSE_SHARE * levels.size:
        body = deflate(levels.tobytes())
        return HEAD.pack(DENSE, 0, len(body), 0) + body
    road = NONZEROS if 2 * count <= levels.size else ZEROS
    places = np.flatnonzero(held if road == NONZEROS else ~held)
    gaps = deflate(gap_bytes(places))
    sizes = deflate((np.abs(values) - 1).astype(np.uint8).tobytes()) if steep else b""
    return (
        HEAD.pack(road, places.size, len(gaps), len(sizes)) + gaps + sizes + np.packbits(values < 0).tobytes()
    )


def unpack(data: bytes | memoryview, count: int) -> NDArray[np.int8]:
    """The `count` levels in `data`. Raises W601; allocates no more than `count` and the length of `data`
    warrant."""
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
    signs = np.frombuffer(body[first + second :], np.uint8)
    if signs.size != (kept + 7) // 8 or (kept % 8 and int(signs[-1]) & (0xFF >> kept % 8)):
        raise broken(f"{signs.size} bytes of signs for {kept} levels")
    values = np.unpackbits(signs, count=kept).view(np.int8)
    values *= -2
    values += 1
    if second:
        sizes = np.frombuffer(inflate(body[first : first + second], kept), np.uint8)
        if sizes.size != kept or (kept and int(sizes.max()) > 126):
            raise broken("magnitudes that do not fit their levels")
        values *= (sizes + 1).view(np.int8)
    if road == ZEROS and not marks:
        return values
    levels = np.zeros(count, np.int8)
    if road == NONZEROS:
        levels[places] = values
    else:
        held = np.ones(count, bool)
        held[places] = False
        levels[held] = values
    return levels


def gap_bytes(places: NDArray[np.int64]) -> bytes:
    """Ascending positions as the number of places skipped before each, base 255 with 255 as 'and more'."""
    gaps = np.diff(places, prepend=-1)
    gaps -= 1
    if not gaps.size or int(gaps.max()) < 255:
        return gaps.astype(np.uint8).tobytes()
    more, rest = np.divmod(gaps, 255)
    out = np.full(int(more.sum()) + gaps.size, 255, np.uint8)
    out[np.cumsum(more + 1) - 1] = rest
    return out.tobytes()


def places_of(data: bytes, marks: int, count: int) -> NDArray[np.int64]:
    """The `marks` positions below `count` that `gap_bytes` wrote. Raises W601."""
    gaps = np.frombuffer(data, np.uint8)
    if gaps.size == marks and not (marks and int(gaps.max()) == 255):
        places = gaps.astype(np.int64)
    else:
        ends = np.flatnonzero(gaps != 255)
        if ends.size != marks or (gaps.size and int(gaps[-1]) == 255):
            raise broken(f"{ends.size} gaps for {marks} marks")
        places = np.diff(np.cumsum(gaps, dtype=np.int64)[ends], prepend=0)
    places += 1
    np.cumsum(places, out=places)
    places -= 1
    if marks and int(places[-1]) >= count:
        raise broken(f"a level at place {int(places[-1])} of {count}")
    return places


def deflate(data: bytes) -> bytes:
    """Raw deflate, Huffman codes only: gaps have no repeats worth searching for."""
    if not data:
        return b""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def inflate(data: memoryview, most: int) -> bytes:
    """What `deflate` was given, if that is at most `most` bytes; the bound holds while decompressing. Raises
    W601."""
    if not data:
        return b""
    decoder = zlib.decompressobj(-15)
    try:
        out = decoder.decompress(data, most + 1)
    except zlib.error:
        raise broken("deflated bytes that cannot be read") from None
    if not decoder.eof or decoder.unused_data or len(out) > most:
        raise broken(f"deflated bytes that do not end with at most {most}")
    return out


def broken(found: str) -> Refused:
    return refuse(
        "W601",
        found,
        "levels in fedtune's encoding",
        "the message was dropped; the sender should send it again",
    )
