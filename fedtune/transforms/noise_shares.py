"""Noise that nobody adds alone: each client puts a share of it on its answer, under a mask, and the sum that
the coordinator can read has all of it (distributed discrete Gaussian; Kairouz, Liu and Steinke 2021,
arXiv:2102.06387).

An answer d, at most C long, becomes whole numbers modulo 2**32 in steps of 1 / s:

    q = trunc(s d) + rint(s N(0, S^2 / k))        k = ceil(honest * members), S = noise_multiplier * C

Cutting towards zero never lengthens, so the sum still changes by at most s C where one client is replaced by
zeros. A sum of k answers or more has noise of S or more. Its whole numbers are as good as a discrete
Gaussian's: rounded normal numbers of a deviation of 2**16 steps have its probabilities within 2e-9 of them
up to twelve deviations, so coarser shares are refused. As in `ring`, a weight goes along: each answer counts
one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from fedtune.privacy.noise import Secret
from fedtune.schema import Schema
from fedtune.transforms.base import Kind, Question, Transform
from fedtune.transforms.bounded import bounded, to_length
from fedtune.transforms.ring import FIGURES, LIMBS, UNIT, from_limbs, limbs, unfit
from fedtune.types import Client, Round, Update

TAIL = 12.0  # deviations of a sum's noise that fit into the ring: beyond them it wraps, once in 1e32 numbers
FINEST = 1 << 16  # steps in a share's deviation, at least


class NoiseShares(Transform):
    name = "private"
    undone: ClassVar[Literal["reply", "sum"]] = "sum"
    gives: ClassVar[Kind] = "ring"
    drops_figures: ClassVar[bool] = True

    def __init__(self, clip: float, noise_multiplier: float, honest: float, fill: bool = False) -> None:
        self.clip, self.multiplier, self.honest, self.fill = clip, noise_multiplier, honest, fill
        self.sigma = clip * noise_multiplier
        self.words = (
            f"{to_length(clip, fill)}, with a share of noise on every number, of which a sum has "
            f"{self.sigma:g} or more"
        )

    def bound(self, question: Question) -> NoiseShares:
        return NoiseShares(1.0, self.multiplier, self.honest, True) if question.directed else self

    def sent(self, answer: Schema) -> Schema:
        return Schema(tuple(sorted((*answer.entries, (FIGURES, (LIMBS,))))))

    def bits(self, schema: Schema, before: float) -> float:
        return 32.0

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        scale, share = scale_of(self.clip, self.sigma, self.honest, len(now.members))
        if share and scale * share < FINEST:
            raise unfit(f"noise of {scale * share:,.0f} steps for client '{client.name}'")
        secret, tensors = Secret(), {}
        for name, value in bounded(update, self.clip, client.name, self.fill).tensors.items():
            levels = np.trunc(scale * np.asarray(value, np.float64))
            if share:
                levels += np.rint(secret.normal(levels.size).reshape(levels.shape) * (scale * share))
            tensors[name] = levels.astype(np.int64).astype(np.uint32)  # wraps, on every machine
        tensors[FIGURES] = limbs(np.array([UNIT], np.uint64))
        return replace(update, tensors=tensors, weight=1.0, metrics={}, scales={})

    def on_sum(self, total: Update, now: Round) -> Update:
        scale, _ = scale_of(self.clip, self.sigma, self.honest, len(now.members))
        tensors = {
            name: np.asarray(value.view(np.int32) / scale, np.float64)
            for name, value in total.tensors.items()
            if name != FIGURES
        }
        return Update(tensors, float(from_limbs(total.tensors[FIGURES])[0]) / UNIT)


def noise_makers(honest: float, members: int) -> int:
    """So many of the members make the whole noise."""
    return math.ceil(honest * members - 1e-9)


def scale_of(clip: float, sigma: float, honest: float, members: int) -> tuple[float, float]:
    """Steps in a whole, so that all answers and their noise fit into 32 bits; and the deviation of one
    client's share of the noise."""
    share = sigma / math.sqrt(noise_makers(honest, members))
    return (2**31 - 1) / (members * clip + TAIL * share * math.sqrt(members)), share
