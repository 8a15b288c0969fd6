"""Random numbers that name their purpose: same seed, same bytes, whatever ran before.

Nothing here may make a secret: keys and nonces come from `secrets`, never from the run's seed.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one named draw, e.g. seed_of("batches", run_seed, round, client).

    SHA-256 keeps draws of different purposes independent, where adding or xor-ing seeds would make them
    collide.
    """
    text = purpose + ":" + ",".join(str(int(n)) for n in numbers)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(purpose: str, *numbers: int) -> np.random.Generator:
    """A numpy generator for one named draw (PCG64, whose streams numpy keeps stable between versions)."""
    return np.random.Generator(np.random.PCG64(seed_of(purpose, *numbers)))
