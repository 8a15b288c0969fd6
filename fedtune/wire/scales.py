"""What integer levels are multiplied by: float16 numbers times one power of two for the whole message.

A float16 alone cannot hold the scale of a round's difference (1e-6 has 4 of its 11 bits left) nor of a broken
one (1e30).
The shape of a tensor's scales says what each multiplies, so levels and scales describe themselves:

    ()            the whole tensor
    (blocks,)     64 values each in C order; the last block may be shorter
    (kept, 1)     one level each, of those that are not 0, in C order
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # facts: int2 by 64 lost nothing at 2.25 bits a parameter
LOWEST, HIGHEST = -125, 113  # exponents for which every float16 times 2**exponent is a float32
Arrays = Mapping[str, np.ndarray]


def blocks(count: int) -> int:
    """Blocks of a tensor of `count` values."""
    return -(-count // BLOCK)


def exponent_for(largest: float) -> int:
    """The exponent that puts the largest scale into [2**14, 2**15), where float16 has all its bits and 29
    octaves below."""
    return max(math.frexp(largest)[1] - 15, LOWEST) if largest else 0


def rounded(scales: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray]:
    """Scales as the wire can carry them, float32; rounding twice changes nothing. Raises OverflowError beyond
    float32."""
    wide = {name: np.asarray(scale, np.float64) for name, scale in scales.items()}
    largest = max((float(scale.max()) for scale in wide.values() if scale.size), default=0.0)
    exponent = exponent_for(largest)
    if largest and float(np.float16(math.ldexp(largest, -exponent))) == 2.0**15:
        exponent += 1
    if not math.isfinite(largest) or exponent > HIGHEST:
        raise OverflowError(f"a scale of {largest:g}")
    return {
        name: np.asarray(
            np.ldexp(np.ldexp(scale, -exponent).astype(np.float16).astype(np.float64), exponent), np.float32
        )
        for name, scale in wide.items()
    }


def to_halves(flat: NDArray[np.float32]) -> tuple[NDArray[np.float16], int]:
    """Rounded scales as (float16 numbers, exponent). Raises ValueError if they were not rounded."""
    exponent = exponent_for(float(flat.max()) if flat.size else 0.0)
    halves = np.ldexp(flat.astype(np.float64), -exponent).astype("<f2")
    if not np.array_equal(np.ldexp(halves.astype(np.float64), exponent), flat.astype(np.float64)):
        raise ValueError("scales must come from fedtune.wire.scales.rounded")
    return halves, exponent


def expand(levels: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Levels times scales, float64, in the levels' shape."""
    out = np.array(levels, np.float64)
    if scale.ndim == 0:
        out *= float(scale)
    elif scale.ndim == 1:
        out.reshape(-1)[:] *= np.repeat(scale.astype(np.float64), BLOCK)[: levels.size]
    else:
        out[levels != 0] *= scale[:, 0]
    return out
