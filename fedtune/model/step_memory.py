"""How much memory a training step or a scoring pass takes, found by doing it without memory.

The network is built of fake tensors (torch's FakeTensorMode), which have shapes and no numbers, and run as it
is trained; every storage is counted while it lives. So the answer knows what a formula does not: logits in
pieces, attention that is fused or not, recomputation, dropout, adapters, and what a given architecture keeps.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedtune.hf.draws import own_draws
from fedtune.hf.probe import image_size
from fedtune.model.objectives import Context
from fedtune.model.settings import TrainSettings
from fedtune.model.training_loss import TrainingLoss
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS


class StorageWatch(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of all storages that operations made and that live now, and the most that lived at once.

    Where a network looks at a number that a fake tensor does not have, it is told false, 1, or that every
    element counts: what takes more memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def hold(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.live:
            self.live[key] = storage.nbytes()
            self.now += self.live[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name == "aten::_local_scalar_dense":
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name == "aten::equal":
            return True
        if name == "aten::nonzero":
            out = torch.empty((args[0].numel(), args[0].ndim), dtype=torch.long, device=args[0].device)
        else:
            out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.hold(tensor)
        return out


class Fused(torch.autograd.Function):  # type: ignore[misc]
    """What fused attention keeps: queries, keys, values, the result, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as torch's kernels do it: they keep no scores, but with dropout on the CPU."""
    plain = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *args: Any, **named: Any) -> Any:
        dropped = named.get("dropout_p", args[1] if len(args) > 1 else 0.0)
        return plain(query, key, value, *args, **named) if dropped else Fused.apply(query, key, value)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def faked(tunable: TunableModel) -> TunableModel:
    """A tunable model of torch's meta device with fake tensors in the place of its own, which say that they
    are on the CPU; it is changed. Call it under FakeTensorMode."""
    made: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if id(value) not in made:
            plain, parameter = (
                torch.empty(value.shape, dtype=value.dtype),
                isinstance(value, torch.nn.Parameter),
            )
            made[id(value)] = torch.nn.Parameter(plain, value.requires_grad) if parameter else plain
        return made[id(value)]

    kept = [*tunable.net.parameters(), *tunable.net.buffers()]  # ids are those of objects that live
    for module in tunable.net.modules():
        for held in (vars(module)["_parameters"], vars(module)["_buffers"]):
            held.update({name: fake(value) for name, value in held.items() if value is not None})
    named = {name: fake(value) for name, value in tunable.named.items()}
    still = {name: fake(value) for name, value in tunable.still.items()}
    weights = {name: fake(value) for name, value in tunable.base.weights.items()}
    del kept
    tunable.base.device, tunable.base.weights = torch.device("cpu"), weights
    tunable.named, tunable.still = named, still
    return tunable


def batch_of_shape(tunable: TunableModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of the task's shapes, all of it carrying loss."""
    base = tunable.base
    if base.task == "image-classify":
        size = image_size(base.net.config, base.tokenizer)
        channels = getattr(base.net.config, "num_channels", None) or 3
        pixels = torch.zeros(batch, channels, *size)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
    sides = (2,) if base.task == "preference" else ()
    ids = torch.ones(batch, *sides, length, dtype=torch.long)
    labels = ids if base.task in LM_TASKS else torch.zeros(batch, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def training_peak(tunable: TunableModel, train: TrainSettings, batch: int, length: int) -> int:
    """Bytes that live at once in a step's two passes, beside the model, the optimiser and a gradient of every
    trained value. `tunable` holds fake tensors."""
    from fedtune.model.fit import here, training

    with fused_attention(), StorageWatch() as watch, training(tunable, train, 0):
        loss_of = TrainingLoss(train.objective, Context((1,) * len(tunable.base.labels)))
        here(tunable, [batch_of_shape(tunable, batch, length)], batch, train.autocast, loss_of)
    return int(max(0, watch.peak - 4 * tunable.trainable))


def scoring_peak(tunable: TunableModel, batch: int, length: int) -> int:
    """Bytes that live at once in a forward pass without gradients, beside the model."""
    from fedtune.model.loss import autocast, summed_loss

    tunable.net.eval()
    with torch.no_grad(), fused_attention(), StorageWatch() as watch, autocast(tunable, "off"):
        summed_loss(tunable, batch_of_shape(tunable, batch, length))
    return int(watch.peak)


Peak = Callable[[TrainSettings | None, int, int], int | None]
known: dict[tuple[str, ...], Peak] = {}  # by all that the answer depends on


def peak_of(tunable: TunableModel) -> Peak:
    """`Plan.peak` for a tunable model of torch's meta device, which from then on is of no other use."""
    base, adapter = tunable.base, tunable.settings
    dtypes = sorted({str(v.dtype) for v in (*base.weights.values(), *tunable.named.values())})
    kind = type(adapter).__name__ + (adapter.model_dump_json() if adapter else "")
    key = (base.net.config.to_json_string(), base.task, base.pooling, base.load, kind, *dtypes)
    if key not in known:
        while len(known) >= 8:
            known.pop(next(iter(known)))
        known[key] = watched(tunable)
    return known[key]


def watched(tunable: TunableModel) -> Peak:
    """Each question is tried out once."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    @cache
    def model() -> TunableModel:
        return faked(tunable)

    @cache
    def tried(train: TrainSettings | None, batch: int, length: int) -> int | None:
        try:
            with mode, own_draws(), uncollected():
                if train is None:
                    return scoring_peak(model(), batch, length)
                return training_peak(model(), train, batch, length)
        except Exception:  # whatever a network wants of numbers that are not there
            return None

    def peak(train: TrainSettings | None, batch: int, length: int) -> int | None:
        decisive = train and TrainSettings(
            autocast=train.autocast, checkpointing=train.checkpointing, objective=train.objective
        )
        return tried(decisive, batch, length)

    return peak


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile, whose moment would change what lives at once."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
