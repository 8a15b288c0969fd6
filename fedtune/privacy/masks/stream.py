"""Masks: as many uniform bytes as a vector has, from a key of 32 bytes (ChaCha20, RFC 8439)."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

PIECE = 1 << 18  # bytes at a time: what the second cache holds
ZEROS = bytes(PIECE)
START = bytes(16)  # counter and nonce: a key makes one stream, ever


def shift(vector: np.ndarray, key: bytes, sign: int) -> None:
    """Add the stream of a key to a flat vector of unsigned numbers, in place; sign -1 subtracts it. All
    modulo 2**32 or 2**64, as the vector's type wraps."""
    cipher = Cipher(algorithms.ChaCha20(key, START), mode=None).encryptor()
    size = vector.dtype.itemsize
    made = bytearray(PIECE)
    stream = np.frombuffer(made, vector.dtype.newbyteorder("<"))
    step = PIECE // size
    for at in range(0, vector.size, step):
        part = vector[at : at + step]
        cipher.update_into(memoryview(ZEROS)[: part.size * size], made)
        if sign > 0:
            part += stream[: part.size]
        else:
            part -= stream[: part.size]
