"""Several clients' local loops in lockstep: one forward and backward pass over the shared base for all of
their batches, each client's own adapter on its own rows (`stacked`).

Every client keeps its own batches, optimiser, clipping and schedule; gradients equal those of training alone
up to the order of floating-point sums, and dropout draws other masks. Worth it where a client's batch is too
small to keep the machine busy.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedtune import progress as progress_of
from fedtune.errors import ClientFailed
from fedtune.model.base import Base
from fedtune.model.collate import collation
from fedtune.model.device_memory import halve, known_to_fit, release
from fedtune.model.encode import Encoded
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
from fedtune.model.packing import OWNERS, fullest, lengths_of, packed, require_packing, rows_of
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
        self.plan = list(step_batches(len(encoded), self.settings, self.trainee.seed, encoded.length))
        self.loss = TrainingLoss.of(self.settings.objective, self.tunable, encoded)

    def step(self, number: int, loss: float, tokens: int) -> None:
        try:
            require_finite_loss(loss, number)
        except ClientFailed as error:
            self.failed = error
            return
        take_step(self.optimizer, self.parameters, self.origin, self.settings)
        self.losses.append(loss)
        self.examples += sum(map(len, self.plan[number]))
        self.tokens += tokens


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
    if settings.packing:
        require_packing(tunable.base)
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
            for one, said in zip(active, losses_of(tunable, places, active, number), strict=True):
                one.step(number, *said)
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
) -> list[tuple[float, int]]:
    """Each client's loss of a step and the tokens behind it, its gradients added up; in smaller groups where
    memory asks for it."""
    most = known_to_fit(tunable.base, "together", len(active))
    if most < len(active):
        parts = (active[start : start + most] for start in range(0, len(active), most))
        return [one for part in parts for one in losses_of(tunable, places, part, number)]
    try:
        return pass_together(tunable, places, active, number)
    except RuntimeError as error:
        halve(tunable.base, "together", len(active), error)
    for one in active:
        one.optimizer.zero_grad(set_to_none=True)
    release(tunable.base)
    return losses_of(tunable, places, active, number)


@dataclass(frozen=True)
class SharedBatch:
    """The rows of one micro-batch of everybody who has one, as many for each: where a client has fewer, its
    last one again, which counts for nothing.

    rows  a client's place among those who are trained -> where its own rows are
    """

    batch: Batch
    rows: dict[int, slice]

    @classmethod
    def of(cls, active: Sequence[Local], number: int, micro: int, base: Base) -> SharedBatch:
        chosen = {n: one.plan[number][micro] for n, one in enumerate(active) if micro < len(one.plan[number])}
        if active[0].settings.packing and (found := cls.packed(active, chosen)):
            return found
        most = max(map(len, chosen.values()))
        rows = [
            active[n].trainee.encoded[index]
            for n, indices in chosen.items()
            for index in [*indices, *[indices[-1]] * (most - len(indices))]
        ]
        own = {
            n: slice(place * most, place * most + len(indices))
            for place, (n, indices) in enumerate(chosen.items())
        }
        return cls(collation(rows, base)(range(len(rows))), own)

    @classmethod
    def packed(cls, active: Sequence[Local], chosen: dict[int, Sequence[int]]) -> SharedBatch | None:
        """As many packed rows for each; None where every text gets a row of its own."""
        batches = [active[n].trainee.encoded.collate(indices) for n, indices in chosen.items()]
        most = max(active[n].trainee.encoded.max_length for n in chosen)
        lengths = [lengths_of(batch) for batch in batches]
        if not (plans := rows_of(lengths, most)):
            return None
        width = fullest(lengths, plans)
        parts = [packed(batch, rows, width) for batch, rows in zip(batches, plans, strict=True)]
        count = len(plans[0])
        own = {n: slice(place * count, (place + 1) * count) for place, n in enumerate(chosen)}
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, own)

    def of_client(self, n: int) -> Batch:
        return {name: value[self.rows[n]] for name, value in self.batch.items()}


def pass_together(
    tunable: TunableModel, places: dict[str, list[Place]], active: Sequence[Local], number: int
) -> list[tuple[float, int]]:
    micros = range(max(len(one.plan[number]) for one in active))
    batches = [SharedBatch.of(active, number, micro, tunable.base) for micro in micros]
    terms, tokens, totals = [0] * len(active), [0] * len(active), [0.0] * len(active)
    for shared in batches:
        for n in shared.rows:
            own = shared.of_client(n)
            terms[n] += carries(tunable.base.task, own)
            tokens[n] += tokens_in(own)
    for shared in batches:
        reference = reference_of(tunable, active[0], shared.batch)  # peft's switch looks at its own tensors
        with put(places, {name: [active[n].everything[name] for n in shared.rows] for name in places}):
            losses = losses_by_client(tunable, active, shared, reference)
            shares = {n: loss / terms[n] for n, loss in losses.items()}
            torch.stack(list(shares.values())).sum().backward()  # here: recomputation asks the network again
        for n, share in shares.items():
            totals[n] += float(share.detach())
    return list(zip(totals, tokens, strict=True))


def reference_of(tunable: TunableModel, one: Local, batch: Batch) -> torch.Tensor | None:
    """What the network says without adapters, where the objective compares with that."""
    if not one.loss.objective.refers:
        return None
    with torch.no_grad(), switched_off(tunable), autocast(tunable, one.settings.autocast):
        return logits_of(tunable, *inputs_of(tunable, batch))[0].float()


def losses_by_client(
    tunable: TunableModel, active: Sequence[Local], shared: SharedBatch, reference: torch.Tensor | None
) -> dict[int, torch.Tensor]:
    """Each client's loss over its own rows, summed, by the network as it is."""
    with autocast(tunable, active[0].settings.autocast):
        logits, labels = logits_of(tunable, *inputs_of(tunable, shared.batch))
        losses = {}
        for n, rows in shared.rows.items():
            without = None if reference is None else reference[rows]
            owners = shared.batch[OWNERS][rows] if OWNERS in shared.batch else None
            losses[n] = active[n].loss.said(logits[rows].float(), labels[rows], without, owners)
    return losses
