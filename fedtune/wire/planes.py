"""Which of many are marked, as bytes: the distances between marks or, where marks are many, a bit a place.

    pack_plane(marked) = [head 9 bytes: form, marks, bytes][deflated]

GAPS and HOLES: places skipped before each mark (or before each that is not marked), a byte each (255: add 255
and go on). BITS: eight places a byte, three times as fast and as small once a third is marked. All of them go
through raw deflate in its Huffman-only mode.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import Refused
from fedtune.wire.frame import refuse

PLANE = struct.Struct("<BII")  # form, marks (BITS: 0), bytes of what follows
GAPS, HOLES, BITS = 0, 1, 2
BITS_SHARE = 0.3  # of the rarer of the two, from which on eight places a byte are as small as gaps


def pack_plane(marked: NDArray[np.bool_]) -> bytes:
    """A flat bool array as bytes."""
    count = int(np.count_nonzero(marked))
    if min(count, marked.size - count) > BITS_SHARE * marked.size:
        body = deflate(np.packbits(marked).tobytes())
        return PLANE.pack(BITS, 0, len(body)) + body
    form = GAPS if 2 * count <= marked.size else HOLES
    places = np.flatnonzero(marked if form == GAPS else ~marked)
    body = deflate(gap_bytes(places))
    return PLANE.pack(form, places.size, len(body)) + body


def unpack_plane(data: memoryview, count: int) -> tuple[NDArray[np.int64], memoryview]:
    """The marked ones of `count` places, ascending, and what follows them. Raises W601; allocates no
    more than `count` and the length of `data` warrant."""
    if len(data) < PLANE.size:
        raise broken("no room for the head of a plane")
    form, marks, size = PLANE.unpack_from(data)
    body, rest = data[PLANE.size : PLANE.size + size], data[PLANE.size + size :]
    if form > BITS or marks > count or len(body) != size:
        raise broken("a head of a plane that does not fit it")
    if form == BITS:
        bits = np.frombuffer(inflate(body, (count + 7) // 8), np.uint8)
        if marks or bits.size != (count + 7) // 8 or (count % 8 and int(bits[-1]) & (0xFF >> count % 8)):
            raise broken(f"{bits.size} bytes of bits for {count} places")
        return np.flatnonzero(np.unpackbits(bits, count=count).view(np.bool_)), rest
    places = places_of(inflate(body, marks + count // 255), marks, count)
    return places if form == GAPS else others(places, count), rest


def others(places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The places below `count` that are not among these."""
    kept = np.ones(count, np.bool_)
    kept[places] = False
    return np.flatnonzero(kept)


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
