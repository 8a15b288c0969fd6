"""`dither`: rounding after public noise, which the server takes off again, so that clients' errors average
out.

Uniform noise u of one step's width is added before rounding and subtracted from what arrives: the error is
then uniform,
independent of the numbers and of every other client (Schuchman 1964; in federated learning UVeQFed,
Shlezinger et al. 2020,
arXiv:2006.03262, sec. III, whose scalar case this is). Plain rounding errs alike on clients that move alike.
Nothing needs
to be remembered between rounds, and the noise follows from run, round and client, so it need not be sent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedtune.rng import stream
from fedtune.schema import Schema
from fedtune.transforms.base import Kind, StepSettings, Transform
from fedtune.transforms.levels import means, root_mean_square, scaled, unpacked
from fedtune.types import Client, Round, Tensors, Update

TOP = 127


class DitherSettings(StepSettings):
    """[[chain]] step = "dither": integer multiples of a step, rounded after public noise that the server
    subtracts again."""

    step: Literal["dither"]
    sigma: float = Field(2.7, gt=0)
    """The step, in root mean squares of the whole difference; 2.7 takes about 1.2 bits a number."""

    def build(self) -> Dither:
        return Dither(self)


class Dither(Transform):
    """Levels of one step for all tensors; the error of a number is at most half a step."""

    name = "dither"
    undone: ClassVar[Literal["reply", "sum"]] = "reply"
    takes: ClassVar[Kind] = "real"
    gives: ClassVar[Kind] = "packed"

    def __init__(self, settings: DitherSettings) -> None:
        self.sigma = settings.sigma
        self.tolerance = settings.sigma / 2 + 0.01

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        values = means(update, client)
        largest = max((float(np.abs(value).max()) for value in values.values() if value.size), default=0.0)
        step = max(
            self.sigma * root_mean_square(values), largest / (TOP - 1)
        )  # half a step of noise must not leave the range
        scales = scaled(
            {name: step if value.any() else 0.0 for name, value in values.items()}
        )  # what did not move is not stirred
        noise = uniform(update.tensors, client.id, now)
        levels = {name: nearest(value, float(scales[name]), noise[name]) for name, value in values.items()}
        return replace(update, tensors=levels, scales=scales)

    def on_reply(self, update: Update, client: int, now: Round) -> Update:
        noise = uniform(update.tensors, client, now)
        plain = unpacked(update)
        tensors = {
            name: value - noise[name] * (float(update.scales[name]) * update.weight)
            for name, value in plain.tensors.items()
        }
        return replace(plain, tensors=tensors)

    def bits(self, schema: Schema, before: float) -> float:
        return dither_rate(self.sigma) + 16 * len(schema.entries) / max(schema.count, 1)


def nearest(value: NDArray[np.float64], step: float, noise: NDArray[np.float64]) -> NDArray[np.int8]:
    """Whole steps nearest to value / step + noise; the clip undoes the scale's own rounding (2**-11) at the
    largest value."""
    if not step:
        return np.zeros(value.shape, np.int8)
    return np.clip(np.rint(value / step + noise), -TOP, TOP).astype(np.int8)


def uniform(tensors: Tensors, client: int, now: Round) -> dict[str, NDArray[np.float64]]:
    """The noise of one answer, in [-1/2, 1/2), in name order."""
    draw = stream("dither", now.seed, now.number, client)
    return {name: draw.random(tensors[name].shape) - 0.5 for name in sorted(tensors)}


def dither_rate(sigma: float) -> float:
    """Entropy of the levels of a normal variable, bits: P(k) is the normal's share of a triangle around k
    steps."""
    offsets = np.linspace(-1, 1, 401)[:, None]
    density = np.exp(-0.5 * ((offsets + np.arange(-64, 65)) * sigma) ** 2)
    shares = np.sum(density * (1 - np.abs(offsets)), axis=0)
    shares = shares[shares > 0] / shares.sum()
    return float(-np.sum(shares * np.log2(shares)))
