"""Keys of a member, keys that two members share, and shares sealed for one of them.

A member's keys for one sum, 96 bytes: the X25519 key that seals (32), the one that masks (32), and SHA-256 of
the seed (32), by which the server knows a false share. A key of a pair is HKDF-SHA256 of their X25519 secret,
with what it is for, the sum's name and both numbers in `info`: it is used once, so its nonce may be zero.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.privacy.masks.shamir import SHARE

KEYS = 96
SEALED = 2 * SHARE + 16  # a share of the seed, one of the masking key, and the tag
NONCE = bytes(12)


@lru_cache(maxsize=4)  # making one costs as much as using it, and a session uses two
def private(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(secret)


def public(secret: bytes) -> bytes:
    return private(secret).public_key().public_bytes_raw()


def commitment(seed: bytes, name: bytes) -> bytes:
    """What a seed is known by before anybody has it."""
    return hashlib.sha256(b"seed" + name + seed).digest()


def pair_key(purpose: bytes, secret: bytes, other: bytes, name: bytes, one: int, two: int) -> bytes:
    """What the holder of `secret` and the owner of the public key `other` alone can know, for one purpose
    between members `one` and `two`. Raises ValueError for a public key of low order."""
    return derived(
        private(secret).exchange(X25519PublicKey.from_public_bytes(other)), purpose, name, one, two
    )


def own_key(seed: bytes, name: bytes, member: int) -> bytes:
    """Of the mask that a member puts on alone."""
    return derived(seed, b"self", name, member, member)


def derived(secret: bytes, purpose: bytes, name: bytes, one: int, two: int) -> bytes:
    info = b"fedtune " + purpose + name + struct.pack("<QQ", one, two)
    return HKDF(hashes.SHA256(), 32, None, info).derive(secret)


def seal(key: bytes, shares: bytes) -> bytes:
    return ChaCha20Poly1305(key).encrypt(NONCE, shares, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Raises ValueError for what was not sealed with this key."""
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, None)
    except InvalidTag:
        raise ValueError("a seal of another key") from None
