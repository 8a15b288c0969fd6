"""How a client of FedKSeed walks by forward passes alone: SPSA, or FZOO's groups of one-sided differences.

A scalar is rounded to what will be sent before it is used, so a step is the one that everybody replays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedtune import progress
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.methods.fedkseed_settings import FedKSeedSettings
from fedtune.methods.fedkseed_ways import Way
from fedtune.methods.integers import Scale
from fedtune.model.settings import TrainSettings

if TYPE_CHECKING:
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel

FEW = 10  # steps whose loss, before much has moved, later rounds are compared with
MARGIN = 1.0  # nats that a round's loss may be above the first, whatever method.guard says


@dataclass(frozen=True)
class Walk:
    """What one client found. scalars: a number of units a step (walkers, in order) or a direction
    (projections)."""

    scalars: np.ndarray
    loss: float
    start: float  # mean loss of the first few steps
    clipped: float = 0.0  # share of the scalars


def walked(
    tunable: TunableModel,
    data: Encoded,
    way: Way,
    seeds: np.ndarray,
    seed: int,
    s: FedKSeedSettings,
    scale: Scale,
    turn: tuple[int, int] = (0, 1),
) -> Walk:
    """Walk along the directions `seeds` (steps,), by a `way` through the tunable model's weights; `turn` =
    (rounds done, rounds). Both sides of a step read the same inputs. Raises ClientFailed W607."""
    from fedtune.model.changed_inputs import ChangedInputs
    from fedtune.model.fit import share_done, step_batches
    from fedtune.model.forward import batch_of, forward_only, mean_loss
    from fedtune.model.training_loss import TrainingLoss

    inputs = ChangedInputs.of(s.train.inputs, tunable, seed)
    loss_of = inputs.around(TrainingLoss.of(s.train.objective, tunable, data))
    groups = seeds.reshape(-1, s.group if s.estimator == "fzoo" else 1)
    scalars, losses, clipped = np.zeros(groups.shape, np.int64), np.zeros(len(groups)), 0
    batches = step_batches(len(data), TrainSettings(steps=len(groups), batch=s.batch), seed)
    with forward_only(tunable, data):
        for step, (group, micro) in enumerate(zip(groups.tolist(), batches, strict=True)):
            read = inputs.at(data, step, share_done(turn, step, len(groups)))
            batch = batch_of(tunable, read, list(micro[0]))
            loss = partial(mean_loss, tunable, batch, loss_of)
            losses[step], found = way.measure(group, loss)
            if not all(map(math.isfinite, found)):
                raise diverged(losses[step], step + 1)
            progress.say("training", step + 1, len(groups), float(losses[step]))
            scalars[step] = [scale.whole(g, s.outside == "drop") for g in found]
            clipped += sum(s.bits > 1 and abs(g) > s.clip for g in found)
            way.take(group, scalars[step].tolist())
    way.end()
    return Walk(scalars.reshape(-1), float(losses.mean()), float(losses[:FEW].mean()), clipped / len(seeds))


def diverged(loss: float, step: int, lower: str = "method.lr") -> ClientFailed:
    found = f"a loss of {loss} and a model that is not finite at local step {step}"
    return ClientFailed("W607", found, "finite numbers", f"lower {lower} or look at this client's data")


def first_loss(tunable: TunableModel, data: Encoded, s: FedKSeedSettings, seed: int) -> float:
    """Mean loss of the first few batches before anything has moved."""
    from fedtune.model.fit import step_batches
    from fedtune.model.forward import batch_of, forward_only, mean_loss
    from fedtune.model.training_loss import TrainingLoss

    loss_of = TrainingLoss.of(s.train.objective, tunable, data)

    with forward_only(tunable, data):
        batches = step_batches(len(data), TrainSettings(steps=FEW, batch=s.batch), seed)
        losses = (mean_loss(tunable, batch_of(tunable, data, list(micro[0])), loss_of) for micro in batches)
        return sum(losses) / FEW


def require_converging(loss: float, first: float, number: int, s: FedKSeedSettings) -> None:
    """Raises R408 where a round's loss is far above the first. Of one that starts low, a multiple is no
    sign: a head that was fitted to the rows has less loss on them than any training with dropout."""
    highest = max(s.guard * first, first + MARGIN)
    if s.guard and loss > highest:
        lower = "method.lr" if s.walks_only else "method.lr, method.gain or method.train.lr"
        raise FedtuneError(
            "R408",
            f"a training loss of {loss:.4g} in round {number} that began at {first:.4g}",
            f"at most {highest:.4g}",
            f"lower {lower}, or raise method.guard if this is expected",
        )
