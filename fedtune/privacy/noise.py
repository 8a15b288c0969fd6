"""Noise that nobody can subtract: from the system's secret source through ChaCha20, never from a run's seed.

Sums of floating-point numbers would give noise away in their last bits (Mironov 2012, "On Significance of the
Least Significant Bits for Differential Privacy"). So values and noise are whole multiples of one step, far
below the noise: `add_gaussian` adds a normal number rounded to it, which is the Gaussian mechanism on the
rounded values, and its output, rounded. Whole numbers get the discrete Gaussian, drawn exactly
(`discrete_gaussian`).
"""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedtune.types import Update

# Steps in a standard deviation. Rounding moves a value by half a step at most, so the sensitivity of 1e8
# numbers grows by 1e8**0.5 / 2**32 < 3e-6 of a noise of its own size.
STEPS = 32
PIECE = 1 << 16  # normal numbers at a time: half a megabyte stays in the second cache


class Secret:
    """A stream of bytes that only this process can know: ChaCha20 (RFC 8439) under a key of 256 bits that the
    operating system drew and that is never written down."""

    def __init__(self) -> None:
        self._stream = Cipher(
            algorithms.ChaCha20(secrets.token_bytes(32), secrets.token_bytes(16)), mode=None
        ).encryptor()

    def bytes(self, count: int) -> bytes:
        return self._stream.update(bytes(count))

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1, all equally likely."""
        size = (limit - 1).bit_length()
        while True:
            number = int.from_bytes(self.bytes((size + 7) // 8), "little") & ((1 << size) - 1)
            if number < limit:
                return number

    def uniform(self, count: int) -> np.ndarray:
        """(count,) numbers in (0, 1], float64, of 53 bits."""
        words = np.frombuffer(self.bytes(8 * count), np.uint64) >> np.uint64(11)
        return (words + np.uint64(1)) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """(count,) standard normal numbers, float64 (Box and Muller 1958)."""
        half = -(-count // 2)
        radius, angle = np.sqrt(-2 * np.log(self.uniform(half))), 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def happens(self, count: int, probability: float) -> np.ndarray:
        """(count,) independent yes or no."""
        return self.uniform(count) <= probability


def add_gaussian(value: np.ndarray, sigma: float, secret: Secret) -> np.ndarray:
    """value + N(0, sigma^2) for each number, float64, as whole multiples of a step of about sigma / 2**32.
    Exactly `value` where sigma is 0.

    A value beyond 2**20 standard deviations or so has a last bit larger than the step, and keeps it.
    """
    if not sigma:
        return value
    step = math.ldexp(1.0, math.frexp(sigma)[1] - STEPS)  # a power of two: division by it is exact
    out = np.asarray(np.rint(np.asarray(value, np.float64) / step))  # an array also where it is one number
    flat = out.reshape(-1)
    for start in range(0, flat.size, PIECE):
        part = flat[start : start + PIECE]
        part += np.rint(secret.normal(part.size) * (sigma / step))
    out *= step
    return out


def noisy(update: Update, sigma: float) -> Update:
    """The update with N(0, sigma^2) on every number, from a secret of its own."""
    if not sigma:
        return update
    secret = Secret()
    return replace(
        update,
        tensors={name: add_gaussian(value, sigma, secret) for name, value in update.tensors.items()},
    )


def discrete_gaussian(count: int, sigma: float, secret: Secret) -> np.ndarray:
    """(count,) whole numbers, int64, with probability in proportion to exp(-x^2 / 2 sigma^2), exactly:
    Canonne, Kamath and Steinke 2020 (arXiv:2004.00010, algorithm 3), in rational arithmetic."""
    square = Fraction(sigma) ** 2
    scale = int(sigma) + 1
    return np.array([one_gaussian(square, scale, secret) for _ in range(count)], np.int64)


def one_gaussian(square: Fraction, scale: int, secret: Secret) -> int:
    """One draw: a discrete Laplace number of that scale, kept with the probability that makes it Gaussian."""
    while True:
        found = one_laplace(scale, secret)
        off = abs(found) - square / scale
        if accepts(off * off / (2 * square), secret):
            return found


def one_laplace(scale: int, secret: Secret) -> int:
    """Probability in proportion to exp(-|x| / scale) (the same, algorithm 2)."""
    while True:
        low = secret.below(scale)
        if not accepts(Fraction(low, scale), secret):
            continue
        high = 0
        while accepts(Fraction(1), secret):
            high += 1
        size = low + scale * high
        minus = secret.below(2)
        if size or not minus:
            return -size if minus else size


def accepts(gamma: Fraction, secret: Secret) -> bool:
    """Yes with probability exp(-gamma), exactly (the same, algorithm 1)."""
    while gamma > 1:
        if not accepts(Fraction(1), secret):
            return False
        gamma -= 1
    count = 1
    while secret.below(gamma.denominator * count) < gamma.numerator:
        count += 1
    return count % 2 == 1
