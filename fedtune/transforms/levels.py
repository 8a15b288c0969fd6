"""The one road of all lossy steps: real numbers -> integer levels and scales on the client, and back on each
reply.

A step is a function from values to (levels, scales); this file gives it both halves and, if asked, error
feedback:

    to be sent = difference + decay * residual        residual = to be sent - what was sent

The residual is a plain difference, not times any weight: a client whose weight changes still owes the same
correction. It
lives in the client's state, and goes when the tensors or the base model change. What was sent plus the
residual is what was
to be sent, over any number of rounds, where nothing decays (Seide et al. 2014;
Karimireddy et al. 2019, arXiv:1901.09847).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ClientFailed
from fedtune.rng import stream
from fedtune.schema import Schema
from fedtune.transforms.base import Kind, Transform
from fedtune.types import Client, Round, Tensors, Update
from fedtune.wire.scales import expand, rounded

Values = Mapping[str, NDArray[np.float64]]
Levels = dict[str, NDArray[np.int8]]
Coded = tuple[Levels, dict[str, np.ndarray]]
Code = Callable[
    [Values, np.random.Generator], Coded
]  # values -> levels, scales; draws only where it is stochastic

MARK = "residual.owner"  # SHA-256 of schema and base, beside the residuals


class Packed(Transform):
    """A lossy code as a step of a chain.

    name       the step's name in a recipe
    rate       estimated bits a level after the lossless coder; scale_every: values that share a scale of 16
               bits, 0: one a tensor
    tolerance  the decoded mean differs from the mean sent by at most this share of its L2 norm, residual left
               out
    feedback   whether the residual is kept and sent later; decay: what is left of it each round
    """

    undone: ClassVar[Literal["reply", "sum"]] = "reply"
    takes: ClassVar[Kind] = "real"
    gives: ClassVar[Kind] = "packed"

    def __init__(
        self,
        name: str,
        code: Code,
        rate: float,
        tolerance: float,
        feedback: bool,
        scale_every: int = 0,
        decay: float = 1.0,
    ) -> None:
        self.name, self.code, self.rate, self.tolerance = name, code, rate, tolerance
        self.feedback, self.scale_every, self.decay = feedback, scale_every, decay

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        values = means(update, client)
        if self.feedback:
            values = owed(values, client, self.decay)
        levels, scales = self.code(values, stream(self.name, now.seed, now.number, client.id))
        if self.feedback:
            remember(values, levels, scales, client)
        return replace(update, tensors=levels, scales=scales)

    def on_reply(self, update: Update, client: int, now: Round) -> Update:
        return unpacked(update)

    def bits(self, schema: Schema, before: float) -> float:
        scales = schema.count / self.scale_every if self.scale_every else len(schema.entries)
        return self.rate + 16 * scales / max(schema.count, 1)


def unpacked(update: Update) -> Update:
    """Levels times scales, times the weight again."""
    tensors = {
        name: expand(level, update.scales[name]) * update.weight for name, level in update.tensors.items()
    }
    return Update(tensors, update.weight, update.metrics)


def means(update: Update, client: Client) -> dict[str, NDArray[np.float64]]:
    """The update without its weight, float64. Raises ClientFailed W607 for what float32 cannot hold."""
    values = {name: np.asarray(value, np.float64) / update.weight for name, value in update.tensors.items()}
    largest = float(np.finfo(np.float32).max)
    for name, value in values.items():
        if value.size and not float(np.abs(value).max()) <= largest:  # NaN compares false
            raise ClientFailed(
                "W607",
                f"a value of '{name}' from client '{client.name}' that float32 cannot hold",
                "finite numbers",
                "lower the learning rate or set method.train.clip",
            )
    return values


def root_mean_square(values: Values) -> float:
    """Over all tensors as one vector; scaled so that 1e30 does not overflow."""
    largest = max((float(np.abs(value).max()) for value in values.values() if value.size), default=0.0)
    count = sum(value.size for value in values.values())
    return (
        largest * math.sqrt(sum(float(np.sum((value / largest) ** 2)) for value in values.values()) / count)
        if largest
        else 0.0
    )


def scaled(scales: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray]:
    """Scales as the wire carries them. Raises ClientFailed W607 for what float32 cannot hold."""
    try:
        return rounded(scales)
    except OverflowError as error:
        raise ClientFailed(
            "W607",
            str(error),
            "numbers that float32 can hold",
            "lower the learning rate or set method.train.clip",
        ) from None


# --- error feedback ---


def owner(tensors: Tensors, client: Client) -> NDArray[np.uint8]:
    """What a residual belongs to: the schema and the frozen base."""
    base = client.model.base.fingerprint if client.model is not None else ""
    return np.frombuffer(
        hashlib.sha256(f"{Schema.of(tensors).fingerprint}:{base}".encode()).digest(), np.uint8
    )


def owed(values: Values, client: Client, decay: float) -> dict[str, NDArray[np.float64]]:
    """What is to be sent: the values plus what is left of what earlier rounds owe; the residual of another
    schema or base is dropped."""
    if not np.array_equal(client.state.get(MARK, np.zeros(0)), owner(values, client)):
        forget(client)
        return dict(values)
    return {name: value + decay * client.state[f"residual/{name}"] for name, value in values.items()}


def remember(values: Values, levels: Tensors, scales: Tensors, client: Client) -> None:
    """Keep what was to be sent and was not, float32."""
    for name, value in values.items():
        client.state[f"residual/{name}"] = np.asarray(value - expand(levels[name], scales[name]), np.float32)
    client.state[MARK] = owner(values, client)


def forget(client: Client) -> None:
    """Drop all residuals."""
    for key in [key for key in client.state if key == MARK or key.startswith("residual/")]:
        del client.state[key]
