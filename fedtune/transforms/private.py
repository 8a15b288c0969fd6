"""Client-level differential privacy: no answer is longer than a bound, and noise hides whether any one client
took part (McMahan et al. 2018, arXiv:1710.06963).

All clients count alike, so that the sum of answers changes by at most `clip` where one of them is replaced by
zeros; the number of answers is taken to be known. Answers of which only the direction counts (class sums that
a head starts from) are brought to a length of 1, under noise of `noise_multiplier`. No amplification by
sampling is claimed: members are drawn from the run's seed, which is no secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.privacy.noise import noisy
from fedtune.privacy.releases import Release
from fedtune.privacy.settings import NOISE_OR_NONE
from fedtune.transforms.base import Question, StepSettings, Transform
from fedtune.transforms.bounded import bounded, to_length
from fedtune.transforms.noise_shares import NoiseShares
from fedtune.types import LM_TASKS, Client, Round, Update


class PrivateSettings(StepSettings):
    """[[chain]] step = "private": no answer is longer than a bound, and noise hides whether a client took
    part."""

    step: Literal["private"]
    clip: float = Field(1.0, ge=0)
    """Greatest L2 norm of what one answer changes, over all tensors; longer ones are shortened. 0: no bound,
    and then there can be no noise."""
    noise_multiplier: float = Field(1.0, ge=0)
    """Standard deviation of the noise in every number, in multiples of clip; 0: none."""
    place: Literal["coordinator", "client", "shares"] = "coordinator"
    """Who adds the noise. coordinator: once, to the sum; it sees the answers before. client: each to its own
    answer, so that nobody has to be trusted; the mean then has as much more noise as there are clients, in
    the root. shares: each a share of it, under step `mask`, so that the coordinator is not trusted and the
    mean has little more noise than under the first."""
    honest: float = Field(0.4, gt=0, le=1)
    """shares: the noise of so large a share of the members makes noise_multiplier. The others may fall out,
    or tell what they added; where they do not, the sum has that much more noise. At most the square of
    mask's `threshold`, which is the least share that a sum can be of."""

    def build(self) -> Transform:
        if self.place == "shares":
            return NoiseShares(self.clip, self.noise_multiplier, self.honest)
        made = NoiseOnSum if self.place == "coordinator" else NoiseOnAnswer
        return made(self.clip, self.noise_multiplier)

    @property
    def spends(self) -> Release:
        return Release("gaussian" if self.clip else "none", "client", self.noise_multiplier)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        here = "[[chain]] step = 'private'"
        if self.noise_multiplier and not self.clip:
            yield (
                f"{here} with clip = 0 and noise_multiplier = {self.noise_multiplier}",
                "a bound, of which the noise is a multiple",
                "set clip above 0, or noise_multiplier = 0",
            )
        if sum(step.step == self.step for step in recipe.chain) > 1:
            yield f"{here} twice", "one", "remove one of them"
        method = recipe.method.provisional.build(recipe.rounds, recipe.aggregate)
        if self.place == "shares":
            yield from self.share_conflicts(recipe, method, here)
        elif "honest" in self.model_fields_set:
            yield f"honest with {here} and place = '{self.place}'", "place = 'shares'", "remove honest"
        weight = recipe.method.model_dump().get("weight", "equal")
        if weight != "equal":
            yield (
                f"method.weight = '{weight}' with {here}",
                "clients that count alike, or the weight would say how much data a client has",
                "set method.weight = 'equal'",
            )
        if method.capabilities.split:
            yield (
                f"method.type = '{recipe.method.type}' with {here}",
                "a method whose clients send nothing but answers; hidden states would leave unprotected",
                "choose another method.type",
            )
        headless = recipe.data.task in LM_TASKS
        for name, verb in method.verbs.items():
            if not (verb.moves or verb.directed or (verb.once and headless)):
                yield (
                    f"the question '{name}' of method.type = '{recipe.method.type}' with {here}",
                    "questions whose answers are differences to what was given, or directions",
                    NOISE_OR_NONE.format(0) if verb.once else "choose another method.type",
                )

    def share_conflicts(self, recipe: Any, method: Any, here: str) -> Iterator[tuple[str, str, str]]:
        """place = "shares" rests on sums of a known least size, that nobody reads the parts of."""
        masks = [step.threshold for step in recipe.chain if step.step == "mask"]
        if not masks or any(step.step == "ring" for step in recipe.chain):
            yield (
                f"{here} and place = 'shares' "
                + ("with step = 'ring'" if masks else "without step = 'mask'"),
                "'private', which makes whole numbers itself, and then 'mask'",
                "remove 'ring'" if masks else "add [[chain]] step = 'mask'",
            )
        elif masks[0] ** 2 < self.honest:
            yield (
                f"{here} and honest = {self.honest:g} with threshold = {masks[0]:g} of 'mask'",
                f"at most {masks[0] ** 2:.3g}, the least share of the members that a sum can be of",
                "lower honest, or raise threshold",
            )
        if not self.clip:
            yield f"{here} and place = 'shares' with clip = 0", "a bound", "set clip above 0"
        if any(verb.by_group for verb in method.verbs.values()):
            yield (
                f"method.type = '{recipe.method.type}' with {here} and place = 'shares'",
                "a method that asks for sums of all members, which have all of the noise",
                "set place = 'client', or choose another method.type",
            )


class NoiseOnSum(Transform):
    """Answers bounded by their client, and again on the coordinator, which trusts no client to have done it;
    noise on their sum."""

    name = "private"
    undone: ClassVar[Literal["reply", "sum"]] = "sum"
    drops_figures: ClassVar[bool] = True

    def __init__(self, clip: float, noise_multiplier: float, fill: bool = False) -> None:
        self.clip, self.multiplier, self.fill = clip, noise_multiplier, fill
        self.sigma = clip * noise_multiplier
        self.relative = bool(clip)
        self.words = f"{to_length(clip, fill)}; before it is used, it gets noise of {self.sigma:g}"

    def bound(self, question: Question) -> NoiseOnSum:
        return NoiseOnSum(1.0, self.multiplier, True) if question.directed and self.clip else self

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        return as_sent(bounded(update, self.clip, client.name, self.fill))

    def on_reply(self, update: Update, client: int, now: Round) -> Update:
        return bounded(update, self.clip, str(client))

    def on_sum(self, total: Update, now: Round) -> Update:
        return noisy(total, self.sigma)


class NoiseOnAnswer(Transform):
    """Answers bounded, with noise on each before it leaves its client."""

    name = "private"
    undone: ClassVar[Literal["reply", "sum"]] = "reply"
    drops_figures: ClassVar[bool] = True

    def __init__(self, clip: float, noise_multiplier: float, fill: bool = False) -> None:
        self.clip, self.multiplier, self.fill = clip, noise_multiplier, fill
        self.sigma = clip * noise_multiplier
        self.relative = bool(clip)
        self.words = f"{to_length(clip, fill)}, with noise of {self.sigma:g} on every number"

    def bound(self, question: Question) -> NoiseOnAnswer:
        return NoiseOnAnswer(1.0, self.multiplier, True) if question.directed and self.clip else self

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        return noisy(bounded(update, self.clip, client.name, self.fill), self.sigma)


def as_sent(update: Update) -> Update:
    """Rounded as the wire rounds, so that the coordinator finds the length that the client has found."""
    return replace(
        update,
        tensors={
            name: np.asarray(value, np.float32).astype(np.float64) for name, value in update.tensors.items()
        },
    )
