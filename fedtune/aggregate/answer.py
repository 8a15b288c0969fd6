"""One client's answer, and what a rule makes of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.aggregate.pairs import Pair
from fedtune.errors import FedtuneError
from fedtune.types import Tensors


@dataclass(frozen=True)
class ClientAdapter:
    """What one client holds after training: absolute values, not yet times `weight`, at the client's own
    rank.

    scale  what the client multiplies B @ A with: alpha/r, or alpha/sqrt(r) with rsLoRA (Kalajdzievski 2023)
    """

    client: int
    tensors: Tensors
    weight: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Combined:
    """What a rule makes of the answers: the server's state of an adapter.

    tensors   the adapter at the server's rank and scale, and the rest; float32
    residual  module -> pair whose plain product (scale 1) stands beside the adapter; the whole of it, not
              this round's step
    report    error: ||result - mean(BA)||_F / ||mean(BA)||_F over all modules, scales inside; 0 where the
              mean product is zero
              drift: the same for plainly averaged factors, whatever the rule; both are blind below 1e-8 where
              a rule does no SVD
    layers    module -> its part of `error`, relative to that module's mean(BA)
    """

    tensors: Tensors
    residual: Mapping[str, Pair] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)


def checked(answers: Iterable[ClientAdapter]) -> Iterator[ClientAdapter]:
    """Answers one by one. Raises W607 for numbers that are not finite or a weight that is not positive, R405
    where there is none."""
    some = False
    for answer in answers:
        some = True
        for what, number in (("weight", answer.weight), ("scale", answer.scale)):
            if not (math.isfinite(number) and number > 0):
                raise FedtuneError(
                    "W607",
                    f"{what} {number} from client {answer.client}",
                    "a positive number",
                    "leave this client out",
                )
        for name, value in answer.tensors.items():
            if not np.isfinite(value).all():
                raise FedtuneError(
                    "W607",
                    f"NaN or Inf in '{name}' from client {answer.client}",
                    "finite numbers",
                    "leave this client out",
                )
        yield answer
    if not some:
        raise FedtuneError("R405", "no answer to combine", "at least one", "look at the clients' errors")


def misfit(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> FedtuneError:
    return FedtuneError(
        "M305",
        f"shape {found} of '{name}'",
        f"{expected}",
        "give all clients the same rank, or use a rule for mixed ranks, such as flexlora",
    )
