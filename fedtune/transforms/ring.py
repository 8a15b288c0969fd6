"""Answers as whole numbers modulo a power of two, which add without rounding: what a mask can cover.

A difference of tensors becomes numbers of 32 bits, in steps so fine that the sum of all members cannot
overflow:

    q = rint(clip(d / C, -1, 1) * (w / W) * M)        M = (2**31 - 1) // members, w = min(weight, W)

and a sum of q times C W / M is the weighted sum of d. Answers that are no differences take 64 bits: whole
numbers as they are, others in units of 2**-24. Weight and figures go with them, as one more tensor, so that
the server reads those of the sum alone: in 64 bits, units of 2**-16, where a ring of 32 bits holds 16 of
them in each number (no carry is lost below 65,536 members). Negative numbers are two's complements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import ClientFailed, Refused
from fedtune.schema import Schema
from fedtune.transforms.base import Kind, Question, StepSettings, Transform
from fedtune.transforms.levels import means
from fedtune.types import Client, Round, Update

FIGURES = "ring.figures"  # the tensor of weight and figures
CUT = "cut"  # a figure of this step's own: the share of numbers beyond the clip
UNIT, FINE = 1 << 16, 1 << 24  # of figures; of numbers of 64 bits
LIMBS = 4
ROOM = 1 << 40  # largest weight or figure of one answer


class RingSettings(StepSettings):
    """[[chain]] step = "ring": whole numbers modulo 2**32, whose sum is exact; what `mask` covers."""

    step: Literal["ring"] = "ring"
    clip: float = Field(1.0, gt=0)
    """Largest change of one number in a round; beyond it, it is cut. The report has the share that was, as
    `cut`."""
    weight: int = Field(1 << 16, ge=1, le=1 << 32)
    """Most that one answer counts: one with more rows counts as this many. The smaller it is, the more digits
    answers of few rows keep."""

    def build(self) -> Ring:
        return Ring(self.clip, self.weight)


class Ring(Transform):
    name = "ring"
    undone: ClassVar[Literal["reply", "sum"]] = "sum"
    takes: ClassVar[Kind] = "real"
    gives: ClassVar[Kind] = "ring"

    def __init__(self, clip: float, weight: int, question: Question | None = None) -> None:
        self.clip, self.most, self.question = clip, weight, question or Question()
        self.wide = not self.question.moves
        self.names = sorted({*self.question.figures, *(() if self.wide else (CUT,))})

    def bound(self, question: Question) -> Ring:
        return Ring(self.clip, self.most, question)

    def sent(self, answer: Schema) -> Schema:
        numbers = 1 + 2 * len(self.names)
        figures = (FIGURES, (numbers if self.wide else LIMBS * numbers,))
        return Schema(tuple(sorted((*answer.entries, figures))))

    def bits(self, schema: Schema, before: float) -> float:
        return 64.0 if self.wide else 32.0

    # --- on the client ---

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        if unknown := update.metrics.keys() - set(self.names):
            raise ValueError(f"figures that were not declared: {sorted(unknown)[:3]}")
        if self.wide:
            return self.whole(update, client, len(now.members))
        weight = min(update.weight, float(self.most))
        factor, steps = weight / self.most, (2**31 - 1) // len(now.members)
        tensors, cut = {}, 0
        for name, value in means(update, client).items():
            parts = value / self.clip
            cut += int(np.count_nonzero(np.abs(parts) > 1))
            levels = np.rint(np.clip(parts, -1, 1) * (factor * steps))
            tensors[name] = levels.astype(np.int64).astype(
                np.uint32
            )  # through int64: wraps, on every machine
        count = sum(value.size for value in tensors.values())
        figures = {name: value * (weight / update.weight) for name, value in update.metrics.items()}
        figures[CUT] = weight * cut / max(count, 1)
        tensors[FIGURES] = limbs(self.told(weight, figures, client))
        return replace(update, tensors=tensors, weight=1.0, metrics={}, scales={})

    def whole(self, update: Update, client: Client, members: int) -> Update:
        most = (2**63 - 1) // members
        tensors = {}
        for name, value in update.tensors.items():
            units = value if self.question.whole else value * FINE
            if value.size and not float(np.abs(units).max()) <= most:
                raise unfit(f"a number of '{name}' from client '{client.name}' beyond the ring's 64 bits")
            tensors[name] = np.asarray(units if self.question.whole else np.rint(units), np.int64).view(
                np.uint64
            )
        tensors[FIGURES] = self.told(update.weight, update.metrics, client)
        return replace(update, tensors=tensors, weight=1.0, metrics={}, scales={})

    def told(self, weight: float, figures: Mapping[str, float], client: Client) -> np.ndarray:
        """The weight; then for each figure its value, and the weight if it is said: (1 + 2 n,) uint64."""
        numbers = [weight]
        for name in self.names:
            numbers += [figures[name], weight] if name in figures else [0.0, 0.0]
        if not all(abs(number) <= ROOM for number in numbers):  # NaN is not
            raise unfit(f"a weight or figure from client '{client.name}' beyond the ring")
        return np.array([round(number * UNIT) for number in numbers], np.int64).view(np.uint64)

    # --- on the server ---

    def on_sum(self, total: Update, now: Round) -> Update:
        told = total.tensors[FIGURES]
        numbers = (told if self.wide else from_limbs(told)).view(np.int64) / UNIT
        weight, pairs = float(numbers[0]), numbers[1:].reshape(-1, 2)
        if not weight > 0:
            raise Refused("W607", f"a sum of weight {weight:g}", "more than 0", "look at the clients' data")
        metrics = {name: float(value) for name, (value, by) in zip(self.names, pairs, strict=True) if by > 0}
        tensors = {
            name: self.real(value, len(now.members))
            for name, value in total.tensors.items()
            if name != FIGURES
        }
        return Update(tensors, weight, metrics)

    def real(self, value: np.ndarray, members: int) -> np.ndarray:
        if self.wide:
            signed = value.view(np.int64)
            return signed if self.question.whole else signed / FINE
        steps = (2**31 - 1) // members
        return np.asarray(value.view(np.int32) * (self.clip * self.most / steps), np.float64)


def limbs(numbers: np.ndarray) -> np.ndarray:
    """(n,) uint64 as (4 n,) uint32 below 2**16, lowest first."""
    parts = [(numbers >> np.uint64(16 * place)) & np.uint64(0xFFFF) for place in range(LIMBS)]
    return np.stack(parts, axis=1).reshape(-1).astype(np.uint32)


def from_limbs(summed: np.ndarray) -> np.ndarray:
    """(4 n,) sums of limbs as (n,) uint64: the sums of the numbers, modulo 2**64."""
    parts = summed.reshape(-1, LIMBS).astype(np.uint64)
    total = np.zeros(len(parts), np.uint64)
    for place in range(LIMBS):
        total += parts[:, place] << np.uint64(16 * place)
    return total


def unfit(found: str) -> ClientFailed:
    return ClientFailed("W607", found, "numbers that fit", "lower the learning rate or set method.train.clip")
