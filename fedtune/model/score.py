"""How good the tunable model's state is on examples: accuracy, or perplexity with every token counted once.
NaN is no score."""

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
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

LARGEST = 700.0  # nats of a loss whose perplexity is still a number


@dataclass(frozen=True)
class Score:
    """loss: mean cross entropy in nats; metric: accuracy in 0..1, or exp(loss); name: which; count: examples
    or tokens scored; said, wanted: the class of each example, in the order in which they were scored."""

    loss: float
    metric: float
    name: str
    count: int
    said: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()


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
    if not math.isfinite(mean) or (language and mean > LARGEST):
        found, expected = (
            f"a loss of {mean:.6g} on the {count} {'tokens' if language else 'examples'} to score",
            "a finite score",
        )
        raise FedtuneError(
            "W607", found, expected, "look at the model's weights and at the rows, or lower the learning rate"
        )
    if language:
        return Score(mean, math.exp(mean), "perplexity", count)
    right = sum(one == other for one, other in zip(said, wanted, strict=True))
    return Score(mean, right / count, "accuracy", count, tuple(said), tuple(wanted))
