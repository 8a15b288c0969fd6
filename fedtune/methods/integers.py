"""FedKSeed's arithmetic in whole numbers: nothing here depends on the order of a sum, a device or a
mathematics library."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from fedtune.rng import stream
from fedtune.schema import digest

FRACTION = 8  # accumulators count 1/256 of a scalar's unit, so that a mean over clients is hardly rounded
LEVELS = 255  # importance travels as one byte a seed


@dataclass(frozen=True)
class Scale:
    """A scalar as a whole number of units: |g| <= clip is |a| <= top. A power of two, so that a * unit is
    exact."""

    unit: float
    top: int

    @classmethod
    def of(cls, clip: float, bits: int) -> Scale:
        """16 bits: the finest unit for which `clip` still fits an int16; 1 bit: the sign alone."""
        if bits == 1:
            return cls(1.0, 1)
        unit = math.ldexp(1.0, 1 - math.frexp(32767 / clip)[1])
        return cls(unit, int(clip / unit))

    def replay(self, lr: float) -> float:
        """What 1 of an accumulator moves a weight by."""
        return -lr * self.unit / (1 << FRACTION)

    def whole(self, g: float, drop: bool) -> int:
        """The scalar that is used and sent; beyond the clip its bound, or 0 where such steps are dropped."""
        if self.top == 1:
            return 1 if g > 0 else -1
        if drop and abs(g) > self.top * self.unit:
            return 0
        return round(max(-self.top, min(self.top, g / self.unit)))


def mean(total: np.ndarray, weight: int) -> np.ndarray:
    """total / weight in 1/256 of a unit, rounded half to even (int64). total and weight stay below 2**53."""
    whole, rest = np.divmod(total, weight)
    part, rest = np.divmod(rest << FRACTION, weight)
    part += (2 * rest > weight) | ((2 * rest == weight) & (part & 1 == 1))
    return (whole << FRACTION) + part


def narrow(accumulators: np.ndarray) -> np.ndarray:
    """As int32 where all fit, which halves the broadcast."""
    fits = not accumulators.size or int(np.abs(accumulators).max()) < 1 << 31
    return accumulators.astype(np.int32) if fits else accumulators.astype(np.int64)


def draw(size: int, steps: int, numbers: tuple[int, ...], levels: np.ndarray | None = None) -> np.ndarray:
    """Seeds of a client's steps: (steps,) numbers below `size`. Server and client draw the same, so no seed
    needs to travel.

    numbers  run seed, round, client
    levels   importance, 0 to 255: seeds are drawn with probability softmax(level / 255) (FedKSeed-Pro, eq.
             7), in whole numbers throughout
    """
    generator = stream("seeds", *numbers)
    if levels is None:
        return generator.integers(0, size, steps)
    upper = np.cumsum(exponentials()[levels])
    return np.searchsorted(upper, generator.integers(0, int(upper[-1]), steps), side="right")


@cache
def exponentials() -> np.ndarray:
    """65536 exp(level / 255), correctly rounded: floating-point libraries do not agree on exp, and one seed
    drawn apart would be a wrong model."""
    return np.array([int((Decimal(level) / LEVELS).exp() * 65536) for level in range(LEVELS + 1)], np.int64)


def importance(amplitudes: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Levels from the sum of |scalars| and the visits of every seed; as in the authors' code a history begins
    with one 0."""
    average = amplitudes / (visits + 1)
    low, high = average.min(), average.max()
    return (
        np.zeros(len(average), np.uint8)
        if low == high
        else np.rint(LEVELS * (average - low) / (high - low)).astype(np.uint8)
    )


def fingerprint(start: bytes, settings: Mapping[str, Any], pools: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 (32 uint8) of all that a rebuilt model follows from: first values, pool, scale,
    accumulators."""
    text = json.dumps([start.hex(), settings, digest(pools)], sort_keys=True)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).copy()


def packed(scalars: np.ndarray, bits: int) -> np.ndarray:
    """A walk's scalars as they travel: whole numbers, or eight signs a byte (zero counts as down)."""
    return scalars if bits > 1 else np.packbits(scalars > 0).astype(np.int64)


def unpacked(sent: np.ndarray, bits: int, steps: int) -> np.ndarray:
    if bits > 1:
        return sent
    return 2 * np.unpackbits(sent.astype(np.uint8), count=steps).astype(np.int64) - 1
