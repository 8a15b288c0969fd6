"""Masks: as many uniform bytes as a vector has, from a key of 32 bytes (ChaCha20, RFC 8439)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

PIECE = 1 << 16  # bytes at a time: what the second cache holds, with the stream and the zeros that it covers
ZEROS = memoryview(bytes(PIECE))
START = bytes(16)  # counter and nonce: a key makes one stream, ever


def shift(vector: np.ndarray, streams: Iterable[tuple[bytes, int]]) -> None:
    """Add the streams of some keys to a flat vector of unsigned numbers, in place, each with a sign: +1, or
    -1 to subtract it. All modulo 2**32 or 2**64, as the type of the vector wraps."""
    ciphers = [
        (Cipher(algorithms.ChaCha20(key, START), mode=None).encryptor(), sign) for key, sign in streams
    ]
    made = bytearray(PIECE)
    stream = np.frombuffer(made, vector.dtype.newbyteorder("<"))
    for at in range(0, vector.size, stream.size):
        part = vector[at : at + stream.size]  # every stream passes over it before the next piece is read
        for cipher, sign in ciphers:
            cipher.update_into(ZEROS[: part.nbytes], made)
            if sign > 0:
                part += stream[: part.size]
            else:
                part -= stream[: part.size]
