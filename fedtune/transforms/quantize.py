"""Dense codes: every number becomes a level. `quantize` by blocks of 64, `sign` by tensor, `deadzone` by a
step in sigma."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedtune.transforms.base import StepSettings
from fedtune.transforms.levels import Coded, Packed, Values, root_mean_square, scaled
from fedtune.wire.scales import BLOCK, blocks

# a level is taken from 0.6 of a step on instead of 0.5: fewer levels, and small ones are the noisy ones
ROUND_UP_FROM = 0.6
BLOCK_BITS = {8: 8.0, 4: 3.9, 2: 1.5}  # entropy of uniform numbers by blocks; bell-shaped ones need less
SKEWED = 3.0  # error of the unbiased sign, as a share of the norm: .76 for normal numbers, 1 for Laplace's


class QuantizeSettings(StepSettings):
    """[[chain]] step = "quantize": integers of 8, 4 or 2 bits, one scale for each 64 numbers."""

    step: Literal["quantize"]
    bits: Literal[8, 4, 2] = 4
    """8, 4, or 2 (levels -1, 0, 1); simulations/README.md has what each of them cost."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Nearest, or up or down by chance so that the mean is right (drawn with the run's seed)."""
    error_feedback: bool = False
    """Keep what rounding lost and send it later; needs a client that remembers between rounds."""

    def build(self) -> Packed:
        """Rounding is off by at most half a step (stochastic: one), a step is the block's largest magnitude /
        top."""
        top = 2 ** (self.bits - 1) - 1
        random = self.rounding == "stochastic"
        tolerance = (8.1 if random else min(4.05 / top, 1.01)) / (top if random else 1)
        return Packed(
            "quantize",
            partial(block_levels, top=top, random=random),
            BLOCK_BITS[self.bits],
            tolerance,
            self.error_feedback,
            BLOCK,
        )


class SignSettings(StepSettings):
    """[[chain]] step = "sign": one bit a number, and one scale for each tensor."""

    step: Literal["sign"]
    scale: Literal["mean", "unbiased"] = "mean"
    """mean: the mean magnitude, which errs least and is too short by a third on bell-shaped numbers;
    unbiased: |x|^2 / |x|_1, with which what is sent is as long along the numbers as they are."""
    error_feedback: bool = True
    """Keep what rounding lost and send it later; without it, accuracy suffers."""

    def build(self) -> Packed:
        """The unbiased scale has no bound on its error but the numbers' own shape: n |x|^2 / |x|_1^2 - 1."""
        unbiased = self.scale == "unbiased"
        tolerance = SKEWED if unbiased else 1.01
        return Packed(
            "sign", lambda values, rng: sign_levels(values, unbiased), 1.0, tolerance, self.error_feedback
        )


class DeadzoneSettings(StepSettings):
    """[[chain]] step = "deadzone": integer multiples of a step, with a wide zone that becomes 0."""

    step: Literal["deadzone"]
    sigma: float = Field(2.0, gt=0)
    """The step, in root mean squares of the whole difference."""
    error_feedback: bool = True
    """Keep what rounding lost and send it later; without it, accuracy suffers."""

    def build(self) -> Packed:
        return Packed(
            "deadzone",
            lambda values, rng: step_levels(values, self.sigma),
            deadzone_rate(self.sigma),
            1.01,
            self.error_feedback,
        )


def block_levels(values: Values, rng: np.random.Generator, top: int, random: bool) -> Coded:
    """Levels -top..top for each 64 values in C order; the block's largest magnitude is level `top`."""
    wide = {}  # name -> (blocks, 64), zeros behind the last value
    for name in sorted(values):
        flat = values[name].reshape(-1)
        wide[name] = np.zeros((blocks(flat.size), BLOCK))
        wide[name].reshape(-1)[: flat.size] = flat
    scales = scaled({name: np.abs(block).max(axis=1, initial=0.0) / top for name, block in wide.items()})
    levels = {}
    for name, block in wide.items():
        scale = scales[name].astype(np.float64)[:, None]
        steps = np.divide(block, scale, out=np.zeros_like(block), where=scale > 0)
        steps = np.floor(steps + rng.random(steps.shape)) if random else np.rint(steps)
        # the clip undoes the scale's own rounding (2**-11), which can put the largest value a hair above
        # `top` steps
        levels[name] = (
            np.clip(steps, -top, top)
            .astype(np.int8)
            .reshape(-1)[: values[name].size]
            .reshape(values[name].shape)
        )
    return levels, scales


def sign_levels(values: Values, unbiased: bool = False) -> Coded:
    """Levels -1 and 1 (0 stays 0), scale = mean magnitude of the tensor's numbers that are not 0, or the
    unbiased one, with which <x, decoded> = |x|^2 (EDEN without its rotation, Vargaftik et al. 2022,
    arXiv:2108.08842)."""
    levels = {name: np.asarray(np.sign(value), np.int8) for name, value in values.items()}
    scale = along if unbiased else mean_kept
    return levels, scaled({name: scale(value, levels[name]) for name, value in values.items()})


def along(value: NDArray[np.float64], levels: NDArray[np.int8]) -> float:
    """|x|^2 / |x|_1 of the numbers whose level is not 0; scaled so that 1e30 does not overflow."""
    largest = float(np.abs(value).max(initial=0.0))
    if not largest:
        return 0.0
    sizes = np.abs(value[levels != 0]) / largest
    return float(np.sum(sizes * sizes)) / float(np.sum(sizes)) * largest


def step_levels(values: Values, sigma: float) -> Coded:
    """Levels floor(|x| / step + 0.4) with x's sign; the scale of a tensor is the one that fits its levels
    best (least squares).

    step = sigma * root mean square of all tensors, or more where 127 such steps would not reach the largest
    number.
    """
    largest = max((float(np.abs(value).max()) for value in values.values() if value.size), default=0.0)
    if not largest:
        return {name: np.zeros(value.shape, np.int8) for name, value in values.items()}, scaled(
            dict.fromkeys(values, 0.0)
        )
    step = max(sigma * root_mean_square(values), largest / 127)
    levels, scales = {}, {}
    for name, value in values.items():
        size = np.floor(np.abs(value) / step + (1 - ROUND_UP_FROM))
        levels[name] = np.asarray(np.copysign(size, value), np.int8)
        energy = float(np.sum(size * size))
        scales[name] = float(np.sum(np.abs(value) / largest * size)) / energy * largest if energy else 0.0
    return levels, scaled(scales)


def mean_kept(value: NDArray[np.float64], levels: NDArray[np.int8]) -> float:
    """Mean magnitude of the numbers whose level is not 0; 0 where there are none."""
    held = levels != 0
    return float(np.abs(value[held]).mean()) if held.any() else 0.0


def deadzone_rate(sigma: float) -> float:
    """Entropy of the levels of a normal variable, bits."""
    edges = [sigma * (k + ROUND_UP_FROM) for k in range(128)]  # |level| > k from here on
    above = [math.erfc(edge / math.sqrt(2)) for edge in edges]
    shares = [1 - above[0]] + [(a - b) / 2 for a, b in pairwise(above) for _ in (0, 1)]
    return -sum(p * math.log2(p) for p in shares if p > 0)
