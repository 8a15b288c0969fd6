"""Sparse codes: the largest numbers of all tensors together, or of each chunk, travel, the rest waits.
`ternary` sends signs, `topk` values."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedtune.transforms.base import StepSettings
from fedtune.transforms.levels import Coded, Levels, Packed, Values, scaled
from fedtune.transforms.quantize import mean_kept

LOW, HIGH = 2, 3  # of two bits; the larger half of the largest numbers is about half as large again


class TernarySettings(StepSettings):
    """[[chain]] step = "ternary": the sign of the largest numbers (Yadav et al. 2023, ComPEFT; Sattler et al.
    2019, STC)."""

    step: Literal["ternary"]
    keep: float = Field(0.2, gt=0, le=1)
    """Share of all numbers that is sent."""
    chunk: int = Field(0, ge=0)
    """One threshold for each so many numbers; 0: one for all tensors."""
    scale: Literal["kept", "sigma"] = "kept"
    """kept: mean magnitude of what a tensor sends; sigma: alpha times the standard deviation of all numbers
    (ComPEFT)."""
    alpha: float = Field(1.0, gt=0)
    """scale = "sigma": the factor."""
    error_feedback: bool = True
    """Keep what was not sent and send it later; without it, accuracy suffers."""
    decay: float = Field(1.0, gt=0, le=1)
    """What is left each round of what was not sent."""

    def build(self) -> Packed:
        alpha = self.alpha if self.scale == "sigma" else 0.0
        return Packed(
            "ternary",
            lambda values, rng: ternary_levels(values, self.keep, alpha, self.chunk),
            1.008 * ternary_bits(self.keep),  # what the coder needs above the bound
            1.01 + alpha,
            self.error_feedback,
            decay=self.decay,
        )


class TopkSettings(StepSettings):
    """[[chain]] step = "topk": the largest numbers as float16 or two bits. With bits = 2, chunk = 4096,
    decay = 0.95 and no outer momentum it is SparseLoCo (Sarfi et al. 2025, arXiv:2508.15706)."""

    step: Literal["topk"]
    keep: float = Field(0.05, gt=0, le=1)
    """Share of all numbers that is sent."""
    chunk: int = Field(0, ge=0)
    """One threshold for each so many numbers; 0: one for all tensors."""
    bits: Literal[16, 2] = 16
    """Bits of a number that is sent; 2: its sign, and whether it is above the mean of its tensor's."""
    error_feedback: bool = True
    """Keep what was not sent and send it later; without it, accuracy suffers."""
    decay: float = Field(1.0, gt=0, le=1)
    """What is left each round of what was not sent."""

    def build(self) -> Packed:
        code, size = (topk_levels, 16) if self.bits == 16 else (two_bit_levels, 1)
        return Packed(
            "topk",
            lambda values, rng: code(values, self.keep, self.chunk),
            1.008 * ternary_bits(self.keep) + size * self.keep,
            1.01,
            self.error_feedback,
            decay=self.decay,
        )


def ternary_levels(values: Values, keep: float, alpha: float = 0.0, chunk: int = 0) -> Coded:
    """Signs of the largest `keep`; alpha > 0 takes ComPEFT's scale, alpha times the standard deviation of all
    numbers."""
    levels = largest_signs(values, keep, chunk)
    if alpha:
        spread = alpha * deviation(values)
        return levels, scaled(dict.fromkeys(values, spread))
    return levels, scaled({name: mean_kept(value, levels[name]) for name, value in values.items()})


def topk_levels(values: Values, keep: float, chunk: int = 0) -> Coded:
    """Signs of the largest `keep`, and one scale for each: its magnitude."""
    levels = largest_signs(values, keep, chunk)
    return levels, scaled({name: np.abs(value[levels[name] != 0])[:, None] for name, value in values.items()})


def two_bit_levels(values: Values, keep: float, chunk: int = 0) -> Coded:
    """The largest `keep` as levels LOW and HIGH, below and above the mean of its tensor's; the scale of a
    tensor is the one that fits its levels best (least squares)."""
    levels, scales = largest_signs(values, keep, chunk), {}
    for name, value in values.items():
        places = np.flatnonzero(levels[name])
        sizes, middle = np.abs(value.reshape(-1)[places]), mean_kept(value, levels[name])
        steps = np.where(sizes > middle, HIGH, LOW)
        levels[name].reshape(-1)[places] *= steps.astype(np.int8)
        scales[name] = (
            middle * float(np.sum(sizes / middle * steps) / np.sum(steps * steps)) if middle else 0.0
        )
    return levels, scaled(scales)


def largest_signs(values: Values, keep: float, chunk: int = 0) -> Levels:
    """Signs where the magnitude is among the largest `keep` of all, or of its chunk of all tensors in name
    order; equals of the smallest one kept are kept too, zeros never."""
    names = sorted(values)
    flat = np.concatenate([values[name].reshape(-1) for name in names]) if names else np.zeros(0)
    sizes, whole = np.abs(flat), flat.size // chunk * chunk if chunk else 0
    rows = sizes[:whole].reshape(-1, chunk or 1), sizes[whole:].reshape(1, -1)
    marked = np.concatenate([among_largest(part, keep).reshape(-1) for part in rows])
    levels, at = np.asarray(np.sign(flat) * marked, np.int8), 0
    out: Levels = {}
    for name in names:
        out[name] = levels[at : at + values[name].size].reshape(values[name].shape)
        at += values[name].size
    return out


def among_largest(rows: NDArray[np.float64], keep: float) -> NDArray[np.bool_]:
    """Which of each row's numbers are among its largest `keep`, one at least."""
    if not rows.size:
        return np.zeros(rows.shape, np.bool_)
    first = rows.shape[1] - max(1, round(keep * rows.shape[1]))
    return np.asarray(rows >= np.partition(rows, first, axis=1)[:, first, None])


def deviation(values: Values) -> float:
    """Standard deviation over all tensors as one vector; scaled so that 1e30 does not overflow."""
    flat = np.concatenate([value.reshape(-1) for value in values.values()])
    largest = float(np.abs(flat).max(initial=0.0))
    return float((flat / largest).std()) * largest if largest else 0.0


def ternary_bits(share: float) -> float:
    """Entropy of levels of which `share` is not 0, with random signs: H2(p) + p bits."""
    if share >= 1:
        return 1.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share) + share
