"""`auto`: the most faithful code that fits a target ratio, by the shape of this client's numbers.

Heavy tails (a kurtosis above 3) favour sparse codes, near-uniform numbers favour signs: facts measured on
LoRA differences of
one round (kurtosis 1.9) and of a whole training (3.4). The choice travels with the message: levels and scales
say what they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from fedtune.schema import Schema
from fedtune.transforms.base import StepSettings, Transform
from fedtune.transforms.levels import Packed, Values, means, unpacked
from fedtune.transforms.quantize import QuantizeSettings, SignSettings
from fedtune.transforms.sparsify import TernarySettings, ternary_bits
from fedtune.types import Client, Round, Update

PLAIN = 16.0  # bits of a bfloat16 number, which the ratio is against
FLAT, HEAVY = 2.5, 4.0  # kurtosis below which signs are best, above which more than 10 % is wasted
STATELESS = 9.0  # largest ratio that needs no client state: 2 bits by blocks come to 1.75


class AutoSettings(StepSettings):
    """[[chain]] step = "auto": picks a code from a target ratio and the kurtosis of the numbers, and says
    which."""

    step: Literal["auto"]
    ratio: float = Field(8.0, ge=1.9, le=200)
    """How many times smaller than bfloat16 an answer should be."""
    error_feedback: bool = True
    """Allow codes that need a client that remembers between rounds; without them the ratio goes up to 9."""

    @model_validator(mode="after")
    def reachable(self) -> AutoSettings:
        if self.ratio > STATELESS and not self.error_feedback:
            raise ValueError(
                f"at most {STATELESS:g} without error_feedback: sparse codes lose too much without it"
            )
        return self

    def build(self) -> Auto:
        return Auto(self)


class Auto(Transform):
    """Chooses a `Packed` for every answer; what comes back says itself how it is to be read."""

    name = "auto"
    takes = "real"
    gives = "packed"
    tolerance = 1.01  # that of the coarsest code

    def __init__(self, settings: AutoSettings) -> None:
        self.settings = settings

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        measured = kurtosis(means(update, client))
        pick = choose(measured, self.settings)
        why = (
            f"auto: {describe(pick)}, because the kurtosis is {measured:.2f} and the target "
            f"{self.settings.ratio:g} times smaller than bfloat16"
        )
        sent = pick.on_client(update, client, now)
        return replace(sent, notes=(*sent.notes, why))

    def on_reply(self, update: Update, client: int, now: Round) -> Update:
        return unpacked(update)

    def bits(self, schema: Schema, before: float) -> float:
        return choose(2.0, self.settings).bits(schema, before)  # 2: a few steps of training


def choose(measured: float, settings: AutoSettings) -> Packed:
    """The most faithful code of at most 16 / ratio bits for numbers of this kurtosis."""
    budget = PLAIN / settings.ratio
    for bits, cost in ((8, 8.25), (4, 4.15), (2, 1.75)):
        if budget >= cost:
            return QuantizeSettings(step="quantize", bits=bits).build()  # type: ignore[arg-type]
    if measured < FLAT and budget >= 1.0:
        return SignSettings(step="sign").build()
    most = 0.1 if measured > HEAVY else 0.2
    return TernarySettings(step="ternary", keep=min(most, density(budget))).build()


def describe(step: Packed) -> str:
    """The code in words, for the events."""
    return f"{step.name} at about {step.rate:.2f} bits{' with error feedback' if step.feedback else ''}"


def density(budget: float) -> float:
    """The share whose ternary code takes `budget` bits, by bisection below 2/3 where the entropy is
    largest."""
    low, high = 1e-4, 2 / 3
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if 1.008 * ternary_bits(middle) <= budget else (low, middle)
    return low


def kurtosis(values: Values) -> float:
    """E[x^4] / E[x^2]^2 over all tensors as one vector around 0: 1 for signs, 1.8 uniform, 3 normal; 3 where
    all are 0."""
    flat = np.concatenate([value.reshape(-1) for value in values.values()]) if values else np.zeros(0)
    largest = float(np.abs(flat).max(initial=0.0))
    if not largest:
        return 3.0
    squares = (flat / largest) ** 2
    return float(np.mean(squares**2) / np.mean(squares) ** 2)
