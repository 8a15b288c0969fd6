"""How good the tunable model's state is on examples: accuracy, perplexity with every token counted once, or
how many pairs of responses it has in their order. NaN is no score."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from fedtune import progress
from fedtune.errors import FedtuneError
from fedtune.model.device_memory import losses_in_parts
from fedtune.model.encode import Encoded
from fedtune.model.frozen_front import FrozenFront
from fedtune.model.loss import autocast, carries, check_room, summed_loss
from fedtune.model.training_loss import pairs_of
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

LARGEST = 700.0  # nats of a loss whose perplexity is still a number


@dataclass(frozen=True)
class Score:
    """loss: mean cross entropy in nats, or of pairs; metric: accuracy in 0..1, or exp(loss); name: which;
    count: examples or tokens scored; said, wanted: the class of each example, in the order in which they were
    scored; margins, per_token: of each pair, by how much the chosen response exceeds the rejected one in
    reward, and in mean log-probability of a token."""

    loss: float
    metric: float
    name: str
    count: int
    said: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    per_token: tuple[float, ...] = ()


def score(
    tunable: TunableModel, encoded: Encoded, batch: int = 32, front: FrozenFront | None = None
) -> Score:
    """Score in eval mode, without mixed precision on float32 models. Examples are sorted by length, so that
    batches hold little padding.

    front  remembers what the frozen blocks say of these examples, from one score to the next
    """
    tunable.check_live()
    if not len(encoded):
        raise FedtuneError(
            "D202", "no examples to score", "at least one", "give the test set rows (data.test_share)"
        )
    check_room(tunable, encoded)
    if encoded.paired:
        return score_pairs(tunable, encoded, batch)
    language = tunable.base.task in LM_TASKS
    order = encoded.by_length()
    loss, count = 0.0, 0
    said: list[int] = []
    wanted: list[int] = []

    def part(start: int, stop: int) -> tuple[float, int, list[int], list[int]]:
        examples = encoded.collate(order[start:stop])
        known = front.of(tunable, (stop - start, start)) if front else nullcontext()
        with autocast(tunable, "off"), known:
            total, logits, labels = summed_loss(tunable, examples)
        progress.say("scoring", stop, len(order))
        classes = [] if logits is None or language else logits.argmax(-1).tolist()
        return (
            total.item(),
            carries(tunable.base.task, examples),
            classes,
            [] if language else labels.tolist(),
        )

    tunable.net.eval()
    with torch.no_grad():
        for total, terms, classes, labels in losses_in_parts(tunable.base, len(order), batch, part):
            loss, count = loss + total, count + terms
            if not language:
                said, wanted = said + classes, wanted + labels
    mean = loss / count
    require_finite(mean, count, "tokens" if language else "examples", LARGEST if language else math.inf)
    if language:
        return Score(mean, math.exp(mean), "perplexity", count)
    right = sum(one == other for one, other in zip(said, wanted, strict=True))
    return Score(mean, right / count, "accuracy", count, tuple(said), tuple(wanted))


def score_pairs(tunable: TunableModel, encoded: Encoded, batch: int) -> Score:
    """By the loss that the base is judged by: its mean, and the share of pairs whose chosen response has the
    greater reward. A pair that is even, as all are for a model that is its own reference, counts half."""
    judge = tunable.base.judge
    if judge is None:
        raise RuntimeError("pairs of responses and no loss to judge them by: set base.judge")
    order = encoded.by_length()
    losses: list[float] = []
    margins: list[float] = []
    per_token: list[float] = []

    def part(start: int, stop: int) -> tuple[list[float], list[float], list[float]]:
        with autocast(tunable, "off"):
            said, reference = pairs_of(judge, tunable, encoded.collate(order[start:stop]))
        progress.say("scoring", stop, len(order))
        means = said.per_token
        return (
            judge.losses(said, reference).tolist(),
            judge.margins(said, reference).tolist(),
            (means[:, 0] - means[:, 1]).tolist(),
        )

    tunable.net.eval()
    with torch.no_grad():
        for some in losses_in_parts(tunable.base, len(order), batch, part):
            for known, more in zip((losses, margins, per_token), some, strict=True):
                known.extend(more)
    mean = math.fsum(losses) / len(losses)
    require_finite(mean, len(losses), "pairs")
    return Score(
        mean,
        sum(map(half, margins)) / len(margins),
        "accuracy",
        len(margins),
        margins=tuple(margins),
        per_token=tuple(per_token),
    )


def half(margin: float) -> float:
    """1 for a pair in its order, 0 for one that is the other way round, a half for one that is even."""
    return (1 + math.copysign(1.0, margin)) / 2 if margin else 0.5


def require_finite(mean: float, count: int, what: str, largest: float = math.inf) -> None:
    """Raises W607."""
    if not math.isfinite(mean) or mean > largest:
        raise FedtuneError(
            "W607",
            f"a loss of {mean:.6g} on the {count} {what} to score",
            "a finite score",
            "look at the model's weights and at the rows, or lower the learning rate",
        )
