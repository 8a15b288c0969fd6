"""DP-SGD: each row's gradient is cut to a length, their sum gets noise, and rows are in a step by chance
(Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

The gradient of a row is that of its own mean loss, whatever else is in its batch: a mean over the tokens of a
batch would let one row change another's. Which rows are in a step, and the noise, come from a secret; a run's
seed would give them away. Rows go through the network one by one, or all at once where opacus knows the
trained layers; it is trusted only where its gradients are the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.linalg import vector_norm as norm
from torch.nn.functional import cross_entropy

from fedtune.errors import ClientFailed
from fedtune.hf.draws import own_draws
from fedtune.model.encode import Encoded
from fedtune.model.kept_front import from_front
from fedtune.model.loss import autocast, carries, hidden_of, inputs_of, logits_of, summed_loss
from fedtune.model.loss_pieces import apart_here
from fedtune.model.objectives.base import IGNORED
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel
from fedtune.privacy.noise import Secret, add_gaussian
from fedtune.types import LM_TASKS

Batch = dict[str, torch.Tensor]
# rows, the sums that their shortened gradients are added to -> the sum of their losses
Add = Callable[[Sequence[int], list[torch.Tensor]], float]

LAYERS = (nn.Linear, nn.Embedding, nn.LayerNorm)  # whose gradients by row opacus finds without help
AT_ONCE = 1 << 28  # bytes of all rows' gradients in memory, up to which a micro-batch goes through at once
SAME = 1e-3  # of a gradient's length: bfloat16 and other orders of sums stay below it, a wrong one does not


def sampled(count: int, s: TrainSettings, secret: Secret) -> Iterator[list[list[int]]]:
    """For each step the rows that chance puts into it, in micro-batches; [] for none."""
    for _ in range(s.private_steps):
        rows = np.flatnonzero(secret.happens(count, s.private.sample_rate)).tolist()
        yield [rows[start : start + s.batch] for start in range(0, len(rows), s.batch)]


@contextmanager
def private_backward(
    tunable: TunableModel, encoded: Encoded, s: TrainSettings, secret: Secret
) -> Iterator[Callable[[Sequence[Sequence[int]], Any, int], float]]:
    """What `fit` calls for a step's gradients, in train mode: their noisy sum over the number of rows that a
    step has on average. A step without rows is noise alone."""
    trained = [value for value in tunable.parameters() if value.requires_grad]
    sigma = s.private.noise_multiplier * s.private.max_grad_norm
    expected = s.private.sample_rate * len(encoded)
    before = [value.detach().clone() for value in trained]
    with adding(tunable, trained, encoded, s) as add:

        def backward(micro: Sequence[Sequence[int]], batches: Any, terms: int) -> float:
            sums = [torch.zeros_like(value, dtype=torch.float32) for value in trained]
            loss = sum(add(rows, sums) for rows in micro)
            for value, total in zip(trained, sums, strict=True):
                noisy = add_gaussian(total.double().cpu().numpy(), sigma, secret) / expected
                value.grad = torch.from_numpy(np.asarray(noisy)).to(value)
            return loss / max(sum(map(len, micro)), 1)

        yield backward
    if sigma and all(torch.equal(one, value) for one, value in zip(before, trained, strict=True)):
        raise ClientFailed(
            "P903",
            "private training after which no trained number has changed",
            "numbers that moved, if only by the noise",
            "choose another method.adapter.kind or optimizer",
        )


@contextmanager
def adding(
    tunable: TunableModel, trained: Sequence[nn.Parameter], encoded: Encoded, s: TrainSettings
) -> Iterator[Add]:
    """The sum of shortened gradients, by opacus where it can and its gradient of one row is the row's own."""

    def one_by_one(rows: Sequence[int], sums: list[torch.Tensor]) -> float:
        return sum(add_row(tunable, trained, encoded.collate([row]), s, sums) for row in rows)

    hooks = hooks_on(tunable, trained, s)
    if hooks is None:
        yield one_by_one
        return

    def at_once(rows: Sequence[int], sums: list[torch.Tensor]) -> float:
        hooks.enable_hooks()
        try:
            return add_rows(tunable, trained, encoded.collate(list(rows)), s, sums)
        finally:
            hooks.disable_hooks()

    known: list[Add] = []

    def settle(way: Add) -> None:
        known[:] = [way]
        if way is one_by_one:
            hooks.cleanup()

    def add(rows: Sequence[int], sums: list[torch.Tensor]) -> float:
        if not known:
            settle(at_once if same(at_once, one_by_one, rows, trained, tunable) else one_by_one)
        if known[0] is at_once:
            try:
                return at_once(rows, sums)
            except ValueError:  # one row does not show that a layer takes all rows as one
                settle(one_by_one)
        return one_by_one(rows, sums)

    try:
        with warnings.catch_warnings():
            # torch says so of the first trained layers, whose inputs have no gradient
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield add
    finally:
        hooks.cleanup()


def mean_loss(tunable: TunableModel, row: Batch) -> torch.Tensor:
    """Of a batch of one row, over what carries its loss."""
    with from_front(tunable, row) as rest:
        return summed_loss(tunable, rest)[0] / max(carries(tunable.base.task, rest), 1)


def add_row(
    tunable: TunableModel,
    trained: Sequence[nn.Parameter],
    row: Batch,
    s: TrainSettings,
    sums: list[torch.Tensor],
) -> float:
    """One backward pass for one row: nothing else can be in its gradient."""
    with autocast(tunable, s.autocast):
        loss = mean_loss(tunable, row)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    gradients = [
        torch.zeros_like(total) if one is None else one.float()
        for one, total in zip(found, sums, strict=True)
    ]
    length = math.sqrt(sum(float(one.double().square().sum()) for one in gradients))
    share = shortening(torch.tensor([length]), s)[0]
    for total, one in zip(sums, gradients, strict=True):
        total.add_(one, alpha=float(share))
    return float(loss.detach())


def add_rows(
    tunable: TunableModel,
    trained: Sequence[nn.Parameter],
    batch: Batch,
    s: TrainSettings,
    sums: list[torch.Tensor],
) -> float:
    """One backward pass for all rows, whose own gradients opacus leaves at the parameters."""
    rows = len(batch["labels"])
    for value in trained:
        value.grad = value.grad_sample = None
    with autocast(tunable, s.autocast):
        losses = row_losses(tunable, batch)
    losses.sum().backward()
    found = [by_row(value, rows) for value in trained]
    norms = torch.stack([norm(one.flatten(1), dim=1, dtype=torch.float64) for one in found]).norm(dim=0)
    shares = shortening(norms, s).to(found[0])
    for total, one in zip(sums, found, strict=True):
        total.add_(torch.tensordot(shares, one, 1))
    for value in trained:
        value.grad = value.grad_sample = None
    return float(losses.detach().sum())


def by_row(value: nn.Parameter, rows: int) -> torch.Tensor:
    """(rows, ...) gradients; they add up to the batch's own, or they are not what they seem."""
    found = value.grad_sample
    if not isinstance(found, torch.Tensor) or found.shape != (rows, *value.shape) or value.grad is None:
        raise ValueError("no gradient for each row")
    apart = (found.float().sum(0) - value.grad.float()).norm()
    if not apart <= SAME * value.grad.float().norm() + 1e-7:
        raise ValueError("gradients of rows that are not those of the batch")
    return found.detach().float()


def row_losses(tunable: TunableModel, batch: Batch) -> torch.Tensor:
    """(rows,) mean cross entropy of each row over its own predicted tokens, or of its class."""
    with from_front(tunable, batch) as rest:
        inputs, labels = inputs_of(tunable, rest)
        if tunable.base.task in LM_TASKS and output_rests(tunable):
            return means_of_labelled(tunable.base.net, *hidden_of(tunable, inputs, labels))
        logits, labels = logits_of(tunable, inputs, labels)
    if tunable.base.task not in LM_TASKS:
        return cross_entropy(logits.float(), labels, reduction="none")
    terms = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return terms.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def output_rests(tunable: TunableModel) -> bool:
    """Whether the output layer may be run on rows of several texts together: opacus needs what a trained
    layer reads text by text."""
    base = tunable.base
    return apart_here(base) and not any(
        value.requires_grad for value in base.net.get_output_embeddings().parameters()
    )


def means_of_labelled(net: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,) the same from the hidden states (rows, tokens, width) in front of the output layer, which is
    run where there is a label alone: of questions and answers most tokens have none."""
    at = labels != IGNORED
    logits = net.get_output_embeddings()(hidden[at])
    terms = cross_entropy(logits.float(), labels[at], reduction="none")
    sums = terms.new_zeros(len(labels)).index_add(0, at.nonzero()[:, 0], terms)
    return sums / at.sum(1).clamp(min=1)


def shortening(norms: torch.Tensor, s: TrainSettings) -> torch.Tensor:
    """(rows,) what each gradient is multiplied by. Raises ClientFailed W607."""
    if not bool(torch.isfinite(norms).all()):
        raise ClientFailed(
            "W607",
            "a row's gradient whose length is not finite",
            "finite numbers",
            "lower method.train.lr, or look at this client's data",
        )
    return (s.private.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)


def hooks_on(tunable: TunableModel, trained: Sequence[nn.Parameter], s: TrainSettings) -> Any:
    """opacus on the network, asleep; None where it is not installed, does not know a trained layer, or the
    gradients of a micro-batch would not fit."""
    mine = {id(value) for value in trained}
    layers = [m for m in tunable.net.modules() if any(id(v) in mine for v in m.parameters(recurse=False))]
    held = sum(id(value) in mine for m in layers for value in m.parameters(recurse=False))
    fits = 4 * s.batch * sum(value.numel() for value in trained) <= AT_ONCE
    if not fits or held != len(mine) or s.checkpointing or not all(type(m) in LAYERS for m in layers):
        return None
    try:
        from opacus.grad_sample import GradSampleHooks
    except ImportError:
        return None
    hooks = GradSampleHooks(tunable.net, loss_reduction="sum", strict=False)
    hooks.disable_hooks()
    return hooks


def same(
    one: Add, other: Add, rows: Sequence[int], trained: Sequence[nn.Parameter], tunable: TunableModel
) -> bool:
    """Whether two ways to add up the gradients of rows agree: on all of the first micro-batch where nothing
    is drawn, else on one row, whose dropout is then drawn alike."""
    device = tunable.base.device
    rows = rows if not draws(tunable.net) else rows[:1]
    results = []
    for way in (one, other):
        sums = [torch.zeros_like(value, dtype=torch.float32) for value in trained]
        try:
            with own_draws(0, device):
                way(rows, sums)
        except (ValueError, RuntimeError, AttributeError, TypeError, KeyError):
            return False
        results.append(torch.cat([total.flatten() for total in sums]))
    return bool((results[0] - results[1]).norm() <= SAME * results[1].norm() + 1e-7)


def draws(net: nn.Module) -> bool:
    """Whether the network may drop anything in training."""
    config = getattr(net, "config", None)
    rates = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    rates += [getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attn_pdrop")]
    return any(rate for rate in rates)
