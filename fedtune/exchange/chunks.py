"""Pieces of a stream, deflated where that makes them at least a tenth smaller."""

from __future__ import annotations

import zlib

from fedtune.errors import Refused
from fedtune.exchange.limits import CHUNK
from fedtune.wire.v1 import exchange_pb2 as pb

SAMPLE = 4096  # bytes that say whether deflating is worth its time; float32 noise loses 7 % at 50 MB a second
WORTH = 0.9


def packed(data: bytes, total: int = 0) -> pb.Piece:
    """At most CHUNK bytes as a piece."""
    middle = len(data) // 2
    sample = data[middle : middle + SAMPLE]
    if len(zlib.compress(sample, 1)) < WORTH * len(sample):
        smaller = zlib.compress(data, 1)
        if len(smaller) < WORTH * len(data):
            return pb.Piece(data=smaller, deflated=True, total=total)
    return pb.Piece(data=data, total=total)


def unpacked(piece: pb.Piece) -> bytes:
    """At most CHUNK bytes, whatever the piece claims. Raises Refused W601, W606."""
    if not piece.deflated:
        data = piece.data
    else:
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(piece.data, CHUNK + 1)
        except zlib.error:
            raise Refused(
                "W601", "a piece that cannot be inflated", "a zlib stream", "send it again"
            ) from None
        if len(data) <= CHUNK and (not inflate.eof or inflate.unused_data):
            raise Refused(
                "W601",
                "a piece that is cut or has more after its end",
                "one whole zlib stream",
                "send it again",
            )
    if len(data) > CHUNK:
        raise Refused(
            "W606", f"a piece of more than {CHUNK} bytes", f"at most {CHUNK}", "send smaller pieces"
        )
    return data
