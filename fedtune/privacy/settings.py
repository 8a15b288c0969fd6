"""The tables that say how much of anybody's data a run may give away, and how training keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from fedtune.privacy.releases import Release
from fedtune.settings import Settings
from fedtune.types import LM_TASKS

# what to do about a question before the first round; {} is the noise that covers its answers
NOISE_OR_NONE = "set method.head_start = 'means' and method.head_noise = {}, or method.head_start = 'random'"


class PrivacySettings(Settings):
    """[privacy]: in what epsilon is counted, and how much there may be of it (docs/privacy.md)."""

    delta: float = Field(1e-5, gt=0, lt=1)
    """The probability with which epsilon need not hold: below one over the number of those that are hidden
    among each other (rows of a client; clients)."""
    budget: float = Field(0.0, ge=0)
    """Greatest epsilon: the run stops before the round that would exceed it. 0: no limit."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.budget and not recipe.spends:
            yield (
                f"privacy.budget = {self.budget} with nothing that is private",
                "[[chain]] step = 'private' or method.train.private",
                "add one of them, or remove privacy.budget",
            )


class PrivateTraining(Settings):
    """[method.train.private]: no row of a client changes its training by more than a bound, and noise hides
    whether any one row was there (DP-SGD)."""

    max_grad_norm: float = Field(0.0, ge=0)
    """Greatest L2 norm of one row's gradient, over all trained tensors; longer ones are shortened. 0:
    training is not private."""
    noise_multiplier: float = Field(1.0, ge=0)
    """Standard deviation of the noise in a step's sum of gradients, in multiples of max_grad_norm; 0:
    none."""
    sample_rate: float = Field(0.1, gt=0, le=1)
    """The probability with which each row is in a step, by itself and in secret: steps have different numbers
    of rows, of which method.train.batch are in memory at a time."""

    def spends(self, steps: int) -> Release | None:
        """What so many steps give away of a row; None where training is not private."""
        if not self.max_grad_norm:
            return None
        return Release("poisson-gaussian", "example", self.noise_multiplier, self.sample_rate, steps)


def asked_before(recipe: Any) -> dict[str, Any]:
    """The questions before the first round, whose answers are sums over rows: name -> Verb."""
    if recipe.data.task in LM_TASKS:
        return {}  # no head of classes that could start from them
    method = recipe.method.provisional.build(recipe.rounds, recipe.aggregate)
    return {name: verb for name, verb in method.verbs.items() if verb.once}


def spent_before(recipe: Any) -> tuple[Release, ...]:
    """What one answer to each of those gives away: of a row where its training is bounded, of a client where
    a step of the chain bounds answers."""
    rows, found = recipe.method.spends, list[Release]()
    for verb in asked_before(recipe).values():
        if verb.directed:
            found += [step.spends for step in recipe.chain if step.spends]
            found += [verb.spends or Release("none", rows.unit)] if rows else []
    return tuple(found)
