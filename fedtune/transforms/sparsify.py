"""Sparse codes: the largest numbers of all tensors together travel, the rest waits. `ternary` sends signs,
`topk` values."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from fedtune.transforms.base import StepSettings
from fedtune.transforms.levels import Coded, Levels, Packed, Values, scaled
from fedtune.transforms.quantize import mean_kept


class TernarySettings(StepSettings):
    """[[chain]] step = "ternary": the sign of the largest numbers (Yadav et al. 2023, ComPEFT; Sattler et al.
    2019, STC)."""

    step: Literal["ternary"]
    keep: float = Field(0.2, gt=0, le=1)
    """Share of all numbers that is sent; one threshold for all tensors."""
    scale: Literal["kept", "sigma"] = "kept"
    """kept: mean magnitude of what a tensor sends; sigma: alpha times the standard deviation of all numbers
    (ComPEFT)."""
    alpha: float = Field(1.0, gt=0)
    """scale = "sigma": the factor."""
    error_feedback: bool = True
    """Keep what was not sent and send it later; without it, accuracy suffers."""

    def build(self) -> Packed:
        alpha = self.alpha if self.scale == "sigma" else 0.0
        return Packed(
            "ternary",
            lambda values, rng: ternary_levels(values, self.keep, alpha),
            1.008 * ternary_bits(self.keep),  # what the coder needs above the bound
            1.01 + alpha,
            self.error_feedback,
        )


class TopkSettings(StepSettings):
    """[[chain]] step = "topk": the largest numbers as float16."""

    step: Literal["topk"]
    keep: float = Field(0.05, gt=0, le=1)
    """Share of all numbers that is sent; one threshold for all tensors."""
    error_feedback: bool = True
    """Keep what was not sent and send it later; without it, accuracy suffers."""

    def build(self) -> Packed:
        rate = 1.008 * ternary_bits(self.keep) + 16 * self.keep
        return Packed(
            "topk", lambda values, rng: topk_levels(values, self.keep), rate, 1.01, self.error_feedback
        )


def ternary_levels(values: Values, keep: float, alpha: float = 0.0) -> Coded:
    """Signs of the largest `keep`; alpha > 0 takes ComPEFT's scale, alpha times the standard deviation of all
    numbers."""
    levels = largest_signs(values, keep)
    if alpha:
        spread = alpha * deviation(values)
        return levels, scaled(dict.fromkeys(values, spread))
    return levels, scaled({name: mean_kept(value, levels[name]) for name, value in values.items()})


def topk_levels(values: Values, keep: float) -> Coded:
    """Signs of the largest `keep`, and one scale for each: its magnitude."""
    levels = largest_signs(values, keep)
    return levels, scaled({name: np.abs(value[levels[name] != 0])[:, None] for name, value in values.items()})


def largest_signs(values: Values, keep: float) -> Levels:
    """Signs where the magnitude is among the largest `keep` of all; equals of the smallest one kept are kept
    too, zeros never."""
    sizes = (
        np.concatenate([np.abs(value).reshape(-1) for value in values.values()]) if values else np.zeros(0)
    )
    if not sizes.size:
        return {name: np.zeros(value.shape, np.int8) for name, value in values.items()}
    count = max(1, round(keep * sizes.size))
    threshold = np.partition(sizes, sizes.size - count)[sizes.size - count]
    return {
        name: np.asarray(np.sign(value) * (np.abs(value) >= threshold), np.int8)
        for name, value in values.items()
    }


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
