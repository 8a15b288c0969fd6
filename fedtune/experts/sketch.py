"""A direction as a few numbers that keep cosines: a count sketch, whose buckets and signs all draw alike
from the seed.

The error of a cosine is about 1/sqrt(size) (Charikar, Chen and Farach-Colton 2002). What leaves a client
has length 1 at most; noise, where it is asked for, comes from the system's secrets and cannot be taken off
by who knows the seed.
"""

from __future__ import annotations

import secrets

import numpy as np

from fedtune.rng import stream
from fedtune.types import Tensors

BLOCK = 2**20  # values whose buckets are drawn at once


def sketch(moved: Tensors, size: int, seed: int, noise: float = 0.0) -> np.ndarray:
    """`size` float32 numbers of length 1 (0 for no move); `noise` is the deviation of a Gaussian on each."""
    draw, out = stream("experts sketch", seed), np.zeros(size)
    for name in sorted(moved):
        flat = moved[name].reshape(-1).astype(np.float64)
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK]
            buckets = draw.integers(0, size, len(part))
            signs = draw.integers(0, 2, len(part)) * 2.0 - 1.0
            out += np.bincount(buckets, part * signs, minlength=size)
    norm = float(np.linalg.norm(out))
    out = out / norm if norm > 0 else out
    if noise:
        out = out + np.random.Generator(np.random.PCG64(secrets.randbits(128))).normal(0.0, noise, size)
    return out.astype(np.float32)
