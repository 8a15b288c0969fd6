"""The words of this room: one client's answer, what a rule makes of many, and the rule itself.

A rule is a value, not a class to inherit from: its file is a function that returns a `Rule` made of functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.aggregate.pairs import Pair
from fedtune.errors import FedtuneError
from fedtune.types import Round, Tensors


@dataclass(frozen=True)
class Answer:
    """What one client holds after training: absolute values, not yet times `weight`, at the client's own rank.

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
    residual  module -> pair whose plain product (scale 1) stands beside the adapter; the whole of it, not this round's step
    report    error: ||result - mean(BA)||_F / ||mean(BA)||_F over all modules, scales inside; 0 where the mean product is zero
              drift: the same for plainly averaged factors, whatever the rule; both are blind below 1e-8 where a rule does no SVD
    layers    module -> its part of `error`, relative to that module's mean(BA)
    """

    tensors: Tensors
    residual: Mapping[str, Pair] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)


Names = Iterable[str]
Combine = Callable[[Iterable[Answer], Combined, float, Round], Combined]


class TooFew(FedtuneError):
    """Fewer answers than the rule needs for what it promises (R410): the round changes nothing, the run goes on."""


def every(names: Names, number: int = 0) -> frozenset[str]:
    return frozenset(names)


def none(names: Names) -> frozenset[str]:
    return frozenset()


def replaced(before: Tensors, mean: Tensors) -> dict[str, np.ndarray]:
    """The mean of what was sent, in the place of what was there; float32, name order. Raises M305 or W607."""
    unknown = sorted(mean.keys() - before.keys())
    if unknown:
        raise FedtuneError("M305", f"a mean of '{unknown[0]}'", "names of the adapter", "average what the rule sends")
    for name, value in mean.items():
        if np.shape(value) != np.shape(before[name]):
            raise misfit(name, np.shape(value), np.shape(before[name]))
        if not np.isfinite(value).all():
            raise FedtuneError("W607", f"NaN or Inf in the mean of '{name}'", "finite numbers", "leave out the client that sent them")
    return {name: np.asarray(mean.get(name, before[name]), dtype=np.float32) for name in sorted(before)}


def passed(tensors: Tensors, scale: float, rank: int, client_scale: float) -> dict[str, np.ndarray]:
    """For rules whose clients all have the server's rank and scale."""
    return dict(tensors)


@dataclass(frozen=True)
class Rule:
    """How answers become the next adapter.

    linear     a weighted mean of answers is enough: `cohort.sum`, then `from_mean`; `combine` is None
    mixed      clients may have ranks and scales of their own
    carries    the result has a residual beside the adapter
    trains     (names, round number) -> what clients train in this round
    sends      (names, round number) -> what travels up
    stays      names -> what a client keeps as its own and the server never overwrites
    from_mean  (adapter before, mean of what was sent) -> adapter
    combine    (answers in ascending id, state before, the server's scale, now) -> state; reads one answer at a time. The server's
               ranks are those of the state before. Arrays of an answer must not change until it returns.
    for_rank   (adapter, its scale, a client's rank, that client's scale) -> the adapter that this client is given
    """

    name: str
    linear: bool
    combine: Combine | None = None
    mixed: bool = False
    carries: bool = False
    trains: Callable[[Names, int], frozenset[str]] = every
    sends: Callable[[Names, int], frozenset[str]] = every
    stays: Callable[[Names], frozenset[str]] = none
    from_mean: Callable[[Tensors, Tensors], dict[str, np.ndarray]] = replaced
    for_rank: Callable[[Tensors, float, int, float], dict[str, np.ndarray]] = passed


def checked(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Answers one by one. Raises W607 for numbers that are not finite or a weight that is not positive, R405 where there is none."""
    some = False
    for answer in answers:
        some = True
        for what, number in (("weight", answer.weight), ("scale", answer.scale)):
            if not (math.isfinite(number) and number > 0):
                raise FedtuneError("W607", f"{what} {number} from client {answer.client}", "a positive number", "leave this client out")
        for name, value in answer.tensors.items():
            if not np.isfinite(value).all():
                raise FedtuneError("W607", f"NaN or Inf in '{name}' from client {answer.client}", "finite numbers", "leave this client out")
        yield answer
    if not some:
        raise FedtuneError("R405", "no answer to combine", "at least one", "look at the clients' errors")


def misfit(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> FedtuneError:
    return FedtuneError("M305", f"shape {found} of '{name}'", f"{expected}", "give every client one rank, or use a rule for mixed ranks, such as flexlora")
