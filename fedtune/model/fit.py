"""A client's local loop: seeded batches, one optimiser made anew, and nothing left behind but the trained
tensors."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from fedtune import progress as progress_of
from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.hf.config import width_of
from fedtune.hf.draws import own_draws
from fedtune.hf.statistics import freeze_statistics, unchanged
from fedtune.model.adapters.layers import in_head
from fedtune.model.adapters.wrap import plain
from fedtune.model.batch_choice import BatchChoice
from fedtune.model.changed_inputs import ChangedInputs
from fedtune.model.curriculum import paced_batches
from fedtune.model.device_memory import halve, known_to_fit, release
from fedtune.model.encode import Encoded
from fedtune.model.kept_front import behind_front, loss_from_front
from fedtune.model.lora_steps import faster, project, train_slices
from fedtune.model.loss import autocast, carries, check_room, tokens_in, uncast
from fedtune.model.packing import in_rows, require_packing
from fedtune.model.private_steps import private_backward, sampled
from fedtune.model.rates import rates_of, with_rates
from fedtune.model.settings import TrainSettings
from fedtune.model.training_loss import Loss, TrainingLoss
from fedtune.model.tunable import TunableModel
from fedtune.privacy.noise import Secret
from fedtune.rng import seed_of, stream


@dataclass(frozen=True)
class FitReport:
    """loss: mean over the steps of each step's mean loss, without the proximal term; tokens and examples
    count what was trained on."""

    loss: float
    steps: int
    examples: int
    tokens: int
    seconds: float


# examples of each micro-batch of a step, their batches, terms of the loss -> the step's loss; gradients are
# added to `.grad`
Backward = Callable[[Sequence[Sequence[int]], Sequence[dict[str, torch.Tensor]], int], float]


def fit(
    tunable: TunableModel,
    encoded: Encoded,
    settings: TrainSettings,
    seed: int,
    progress: tuple[int, int] = (0, 1),
    backward: Backward | None = None,
    rates: Mapping[str, float] | None = None,
    around: Callable[[Loss], Loss] | None = None,
) -> FitReport:
    """Train the tunable model's tensors on the client's examples. `progress` = (rounds done, rounds) places
    the learning-rate schedule.

    `backward` computes a step's loss and gradients where the network is not run here; `rates` are learning
    rates of single tensors by name; `around` adds terms to the loss of a batch.
    A step's loss is its sum over tokens (or examples) divided by their number over all micro-batches of the
    step, so that accumulation equals
    one big batch; where the device's memory is too small for a micro-batch, it is halved and the step done
    again.
    Raises ClientFailed W607 where the loss is not finite, M309 where not even one example fits, D205 without
    examples; Refused F507 where a site's own script stands in for this loop and is asked for more than that.
    """
    tunable.check_live()
    if not len(encoded):
        raise FedtuneError(
            "D205", "a client without training examples", "at least one", "give it rows or leave it out"
        )
    check_room(tunable, encoded)
    if tunable.trainer is not None:
        if backward or rates or around:
            raise Refused(
                "F507",
                "a loss, gradients or rates of a method's own at a site whose own script trains (--trainer)",
                "an adapter that is trained by the local loop",
                "start this site without --trainer for such a recipe",
            )
        report: FitReport = tunable.trainer(tunable, encoded, settings, seed)
        return report
    if settings.packing:
        require_packing(tunable.base)
    began = time.perf_counter()
    parameters = tunable.parameters()
    origin = [value.detach().clone() for value in parameters] if settings.prox else []
    optimizer = make_optimizer(tunable, settings, rates or {})
    train_slices(optimizer, tunable, seed)
    inputs = ChangedInputs.of(settings.inputs, tunable, seed)
    secret = Secret() if settings.private.max_grad_norm else None
    loss_of = inputs.around(TrainingLoss.of(settings.objective, tunable, encoded))
    loss_of = loss_from_front(around(loss_of) if around else loss_of)
    whole = encoded if backward else behind_front(tunable, encoded)
    chosen = BatchChoice(settings.uds, tunable, encoded, seed_of("uds", seed))
    plan = list(
        sampled(len(encoded), settings, secret)
        if secret
        else step_batches(len(encoded), settings, seed, encoded.length)
        if settings.curriculum.idle
        else paced_batches(len(encoded), settings, seed, progress)
    )
    loss_sum, examples, tokens = 0.0, 0, 0
    with (
        training(tunable, settings, seed),
        private_backward(tunable, whole, settings, secret) if secret else nullcontext(backward) as backward,
    ):
        for number, micro in enumerate(plan):
            set_rates(optimizer, schedule_factor(settings, progress, number, len(plan)))
            micro = chosen.kept(micro)
            read = inputs.at(whole, number, share_done(progress, number, len(plan)))
            read = in_rows(read) if settings.packing else read
            batches = [read.collate(indices) for indices in micro]
            terms = sum(carries(tunable.base.task, batch) for batch in batches)
            optimizer.zero_grad(set_to_none=True)
            if backward:
                loss = backward(micro, batches, terms)
            else:
                loss = in_memory(tunable, read, micro, batches, terms, settings, loss_of)
            require_finite_loss(loss, number)
            take_step(optimizer, parameters, origin, settings)
            progress_of.say("training", number + 1, len(plan), loss)
            loss_sum, examples, tokens = (
                loss_sum + loss,
                examples + sum(map(len, micro)),
                tokens + sum(map(tokens_in, batches)),
            )
    return FitReport(loss_sum / max(len(plan), 1), len(plan), examples, tokens, time.perf_counter() - began)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = factor * group["full_lr"]


def require_finite_loss(loss: float, number: int) -> None:
    """Raises ClientFailed W607."""
    if not math.isfinite(loss):
        raise ClientFailed(
            "W607",
            f"a loss of {loss} at local step {number + 1}",
            "a finite number",
            "lower method.train.lr, set method.train.clip, or look at this client's data",
        )


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    origin: Sequence[torch.Tensor],
    settings: TrainSettings,
) -> None:
    """One step with the gradients that are there. FedProx adds the gradient of mu/2 ||w - w_round||^2;
    without an origin there is no such term."""
    for value, start in zip(parameters, origin, strict=False):
        pull = (value.detach() - start).mul_(settings.prox)
        value.grad = pull if value.grad is None else value.grad.add_(pull)
    if longest := settings.longest_gradient:
        torch.nn.utils.clip_grad_norm_(parameters, longest)
    optimizer.step()


def in_memory(
    tunable: TunableModel,
    encoded: Encoded,
    micro: Sequence[Sequence[int]],
    batches: Sequence[dict[str, torch.Tensor]],
    terms: int,
    settings: TrainSettings,
    loss_of: Loss,
) -> float:
    """A step's loss with its micro-batches, or with halves of them as often as memory is too small; what was
    enough is enough for this process's later steps and clients, too."""
    base = tunable.base
    most = known_to_fit(base, "training", settings.batch)
    while True:
        pieces = [part[start : start + most] for part in micro for start in range(0, len(part), most)]
        try:
            return here(
                tunable,
                batches if len(pieces) == len(micro) else [encoded.collate(piece) for piece in pieces],
                terms,
                settings.autocast,
                loss_of,
            )
        except RuntimeError as error:
            most = halve(base, "training", max(map(len, pieces)), error)
        for value in tunable.parameters():  # what the failed try has added
            value.grad = None
        release(base)


def here(
    tunable: TunableModel,
    batches: Sequence[dict[str, torch.Tensor]],
    terms: int,
    mixed: str,
    loss_of: Loss,
) -> float:
    """A step's loss and gradients by the tunable model's own network."""
    parts = []
    for batch in batches:
        with autocast(tunable, mixed):
            part = loss_of(tunable, batch) / terms
        part.backward()
        parts.append(part.detach())
    return sum(float(part) for part in parts)  # at the end: each asks the device to finish


def make_optimizer(
    tunable: TunableModel, s: TrainSettings, rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW or SGD; the task head, LoRA+'s B, and tensors in `rates`, are groups of their own where they have
    their own rate."""
    if s.open:
        s = with_rates(s, rates_of(tunable.kind), width_of(tunable.base.net.config))
    head = {name for name in tunable.named if s.head_lr and in_head(tunable.base, plain(name))}
    ratio, fast = faster(tunable)
    rest = tunable.named.keys() - head - rates.keys() - fast
    parts = [
        (s.lr, [v for n, v in tunable.named.items() if n in rest]),
        (s.head_lr, [v for n, v in tunable.named.items() if n in head]),
        (ratio * float(s.lr), [v for n, v in tunable.named.items() if n in fast - rates.keys()]),
    ]
    parts += [(rate, [tunable.named[name]]) for name, rate in rates.items()]
    groups: list[dict[str, Any]] = [
        {"params": values, "lr": rate, "full_lr": rate} for rate, values in parts if values
    ]
    if s.optimizer == "adamw":
        fused = tunable.base.device.type == "cuda"  # one kernel for all tensors; the CPU's bits stay
        made = torch.optim.AdamW(groups, weight_decay=s.weight_decay, fused=fused or None)
    else:
        made = torch.optim.SGD(groups, momentum=s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov)
    project(made, tunable)
    return made


def step_batches(
    count: int, s: TrainSettings, seed: int, length: Callable[[int], int] = lambda index: 1
) -> Iterator[Sequence[Sequence[int]]]:
    """Per optimiser step, its micro-batches of example numbers: every epoch is one permutation, its last
    batch may be smaller.

    Steps may wrap over epochs; a client with fewer examples than a batch uses all it has. With
    method.train.bucket, those of so many batches are put in order of `length` before they are divided.
    """
    draw = stream("batches", seed)

    def batches() -> Iterator[Sequence[int]]:
        epoch = 0
        while count and (s.steps or epoch < s.epochs):
            order = draw.permutation(count).tolist()
            if s.bucket == 1:
                yield from (order[start : start + s.batch] for start in range(0, count, s.batch))
            else:
                yield from by_length(order)
            epoch += 1

    def by_length(order: list[int]) -> Iterator[Sequence[int]]:
        for first in range(0, count, s.bucket * s.batch):
            some = sorted(order[first : first + s.bucket * s.batch], key=length, reverse=True)
            parts = [some[start : start + s.batch] for start in range(0, len(some), s.batch)]
            yield from (parts[place] for place in draw.permutation(len(parts)).tolist())

    source = batches()
    done = 0
    while not s.steps or done < s.steps:
        micro = list(islice(source, s.accumulate))
        if not micro:
            return
        yield micro
        done += 1


def share_done(progress: tuple[int, int], step: int, steps: int) -> float:
    """How much of the run lies before a step of `steps`, where `progress` = (rounds done, rounds)."""
    done, rounds = progress
    return (done + step / steps) / rounds


def schedule_factor(s: TrainSettings, progress: tuple[int, int], step: int, steps: int) -> float:
    """What the learning rate is multiplied by. Counted in shares of the run, since clients may take different
    numbers of steps."""
    now, after = (share_done(progress, number, steps) for number in (step, step + 1))
    if now < s.warmup:
        return min(1.0, after / s.warmup)
    rest = (now - s.warmup) / (1 - s.warmup)
    falls = {"constant": 1.0, "linear": 1 - rest, "cosine": 0.5 * (1 + math.cos(math.pi * rest))}[s.schedule]
    return falls + s.floor * (1 - falls)


@contextmanager
def training(tunable: TunableModel, settings: TrainSettings, seed: int) -> Iterator[None]:
    """Train mode with seeded dropout and, if asked, recomputation (which transformers does in train mode
    only); eval mode afterwards."""
    device, net = tunable.base.device, tunable.base.net
    if settings.checkpointing and (tunable.in_cache or not net.supports_gradient_checkpointing):
        found = f"method.train.checkpointing with kind '{tunable.kind}' on a {type(net).__name__}"
        raise FedtuneError(
            "M306",
            found,
            "a model that can recompute, and no prefixes (they are a cache)",
            "turn method.train.checkpointing off",
        )
    with own_draws(seed_of("dropout", seed), device), uncast(tunable, settings.autocast):
        tunable.net.train()
        freeze_statistics(tunable.base.net)
        if settings.checkpointing:
            recompute(net, True)
        try:
            with unchanged(tunable.base.net):
                yield
        finally:
            if settings.checkpointing:
                recompute(net, False)
            tunable.net.eval()
            for value in tunable.parameters():
                value.grad = None


def recompute(net: Any, on: bool) -> None:
    """Switch recomputation of activations. The name is deprecated since transformers 5.2x, but all of 5 has
    it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            net.gradient_checkpointing_disable()
