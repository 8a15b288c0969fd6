"""A secret of 32 bytes in shares, any `threshold` of which give it back, and fewer say nothing of it (Shamir
1979, "How to Share a Secret", CACM 22(11)).

    >>> shares = split(bytes(range(32)), 2, (4, 7, 9))
    >>> joined({4: shares[4], 9: shares[9]}) == bytes(range(32))
    True
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from functools import lru_cache

PRIME = 2**256 + 297  # the smallest prime that any 32 bytes are below
SECRET, SHARE = 32, 33  # bytes


def split(secret: bytes, threshold: int, points: Collection[int]) -> dict[int, bytes]:
    """A share for each point: the values, at the points, of a random polynomial of degree threshold - 1 whose
    value at 0 is the secret. Points are different, above 0."""
    number = int.from_bytes(secret, "big")
    coefficients = [*(secrets.randbelow(PRIME) for _ in range(threshold - 1)), number]
    shares = {}
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE, "big")
    return shares


def joined(shares: Mapping[int, bytes]) -> bytes:
    """The secret that these shares are of. Raises ValueError where they are of none."""
    weights = weights_at_zero(tuple(sorted(shares)))
    total = sum(weight * int.from_bytes(shares[point], "big") for point, weight in weights.items()) % PRIME
    if total >> 8 * SECRET:
        raise ValueError("shares that are of no secret")
    return total.to_bytes(SECRET, "big")


@lru_cache(maxsize=16)  # all secrets of a sum are mostly joined at the same points
def weights_at_zero(points: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights: what each point's value counts in the value at 0."""
    weights = {}
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        weights[point] = above * pow(below, -1, PRIME) % PRIME
    return weights
