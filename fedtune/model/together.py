"""Several clients' local loops in lockstep: one forward and backward pass over the shared base for all of
their batches, each client's own adapter on its own rows (`stacked`).

Every client keeps its own batches, optimiser, clipping and schedule; gradients equal those of training alone
up to the order of floating-point sums, and dropout draws other masks. Worth it where a client's batch is too
small to keep the machine busy.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedtune import progress as progress_of
from fedtune.errors import ClientFailed
from fedtune.model.device_memory import halve, known_to_fit, release
from fedtune.model.encode import Encoded, collation
from fedtune.model.fit import (
    FitReport,
    make_optimizer,
    require_finite_loss,
    schedule_factor,
    set_rates,
    step_batches,
    take_step,
    training,
)
from fedtune.model.loss import autocast, carries, inputs_of, logits_of, tokens_in
from fedtune.model.objectives import Predictions
from fedtune.model.settings import TrainSettings
from fedtune.model.stacked import Place, places_of, put
from fedtune.model.training_loss import TrainingLoss, switched_off
from fedtune.model.tunable import TunableModel, read
from fedtune.rng import seed_of
from fedtune.types import Tensors

Batch = dict[str, torch.Tensor]
Trained = tuple[FitReport, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Trainee:
    """A client that is to be trained: its examples, the values that it starts from, and its seed."""

    encoded: Encoded
    start: Tensors
    seed: int


@dataclass
class Local:
    """One client's half of the lockstep; `named` are its own tensors."""

    trainee: Trainee
    tunable: TunableModel  # with the tensors of this client that are trained
    everything: dict[str, torch.nn.Parameter]  # these, and those that stay
    settings: TrainSettings
    failed: ClientFailed | None = None
    losses: list[float] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        encoded = self.trainee.encoded
        self.optimizer = make_optimizer(self.tunable, self.settings, {})
        self.parameters = self.tunable.parameters()
        self.origin = [v.detach().clone() for v in self.parameters] if self.settings.prox else []
        self.plan = list(step_batches(len(encoded), self.settings, self.trainee.seed))
        self.loss = TrainingLoss.of(self.settings.objective, self.tunable, encoded)

    def terms(self, number: int) -> int:
        encoded, task = self.trainee.encoded, self.tunable.base.task
        return sum(carries(task, encoded.collate(indices)) for indices in self.plan[number])

    def step(self, number: int, loss: float) -> None:
        try:
            require_finite_loss(loss, number)
        except ClientFailed as error:
            self.failed = error
            return
        take_step(self.optimizer, self.parameters, self.origin, self.settings)
        batches = [self.trainee.encoded.collate(indices) for indices in self.plan[number]]
        self.losses.append(loss)
        self.examples += sum(map(len, self.plan[number]))
        self.tokens += sum(map(tokens_in, batches))


def fit_together(
    tunable: TunableModel,
    trainees: Sequence[Trainee],
    settings: TrainSettings,
    trained: Collection[str],
    progress: tuple[int, int] = (0, 1),
) -> list[Trained | ClientFailed]:
    """Train the tensors `trained` of each client on its own examples, all at once; all that each ends with,
    in their order. A client whose loss is not finite fails alone. Raises ClientFailed M309, FedtuneError
    M306."""
    tunable.check_live()
    began = time.perf_counter()
    places = places_of(tunable.net, tunable.named)
    locals_ = [local(tunable, one, settings, trained) for one in trainees]
    with training(tunable, settings, seed_of("together", *(one.seed for one in trainees))):
        for number in range(steps := max(len(one.plan) for one in locals_)):
            active = [one for one in locals_ if number < len(one.plan) and not one.failed]
            if not active:
                break
            for one in active:
                set_rates(one.optimizer, schedule_factor(settings, progress, number, len(one.plan)))
                one.optimizer.zero_grad(set_to_none=True)
            for one, loss in zip(active, losses_of(tunable, places, active, number), strict=True):
                one.step(number, loss)
            progress_of.say("training", number + 1, steps, active[0].losses[-1] if active[0].losses else 0.0)
    seconds = (time.perf_counter() - began) / max(len(trainees), 1)
    return [
        one.failed
        or (
            FitReport(
                sum(one.losses) / max(len(one.losses), 1), len(one.losses), one.examples, one.tokens, seconds
            ),
            read(one.everything),
        )
        for one in locals_
    ]


def local(
    tunable: TunableModel, trainee: Trainee, settings: TrainSettings, trained: Collection[str]
) -> Local:
    everything = {
        name: torch.nn.Parameter(
            torch.tensor(trainee.start[name], device=value.device), requires_grad=name in trained
        )
        for name, value in tunable.named.items()
    }
    own = replace(tunable, named={name: everything[name] for name in everything if name in trained})
    return Local(trainee, own, everything, settings)


def losses_of(
    tunable: TunableModel, places: dict[str, list[Place]], active: Sequence[Local], number: int
) -> list[float]:
    """Each client's loss of a step, its gradients added up; in smaller groups where memory asks for it."""
    most = known_to_fit(tunable.base, "together", len(active))
    if most < len(active):
        parts = (active[start : start + most] for start in range(0, len(active), most))
        return [loss for part in parts for loss in losses_of(tunable, places, part, number)]
    try:
        return pass_together(tunable, places, active, number)
    except RuntimeError as error:
        halve(tunable.base, "together", len(active), error)
    for one in active:
        one.optimizer.zero_grad(set_to_none=True)
    release(tunable.base)
    return losses_of(tunable, places, active, number)


def pass_together(
    tunable: TunableModel, places: dict[str, list[Place]], active: Sequence[Local], number: int
) -> list[float]:
    totals = [0.0] * len(active)
    terms = [one.terms(number) for one in active]
    own = {name: [one.everything[name] for one in active] for name in places}
    for micro in range(max(len(one.plan[number]) for one in active)):
        there = [n for n, one in enumerate(active) if micro < len(one.plan[number])]
        group = [active[n] for n in there]
        rows = [one.plan[number][micro] for one in group]
        batch = batch_of(tunable, group, rows)
        mixed = active[0].settings.autocast
        with autocast(tunable, mixed):
            reference = reference_of(tunable, batch) if group[0].loss.objective.refers else None
        with put(places, {name: [own[name][n] for n in there] for name in own}):
            with autocast(tunable, mixed):
                said = logits_of(tunable, *inputs_of(tunable, batch))
                parts = losses_by_client(group, list(map(len, rows)), *said, reference)
                shares = [part / terms[n] for n, part in zip(there, parts, strict=True)]
            torch.stack(shares).sum().backward()  # here, since recomputation goes through the network again
        for n, share in zip(there, shares, strict=True):
            totals[n] += float(share.detach())
    return totals


def batch_of(tunable: TunableModel, group: Sequence[Local], chosen: Sequence[Sequence[int]]) -> Batch:
    """One batch of everybody's rows, as many for each: where a client has fewer, its last one again."""
    most = max(map(len, chosen))
    rows = [
        one.trainee.encoded[index]
        for one, indices in zip(group, chosen, strict=True)
        for index in [*indices, *[indices[-1]] * (most - len(indices))]
    ]
    return collation(rows, tunable.base)(range(len(rows)))


def reference_of(tunable: TunableModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), switched_off(tunable):
        return logits_of(tunable, *inputs_of(tunable, batch))[0].float()


def losses_by_client(
    group: Sequence[Local],
    counts: Sequence[int],
    logits: torch.Tensor,
    labels: torch.Tensor,
    reference: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """Each client's loss over its own rows, summed; `batch_of` says where they are."""
    for n, (one, count) in enumerate(zip(group, counts, strict=True)):
        mine = slice(n * max(counts), n * max(counts) + count)
        without = None if reference is None else reference[mine]
        said = Predictions(logits[mine].float(), labels[mine], one.loss.context, without)
        yield one.loss.objective.summed(said)
