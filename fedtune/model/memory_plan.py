"""What a recipe would train, from config.json alone: the network is built without memory (torch's meta
device)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedtune.hf.config import AUTO, load_config, locate
from fedtune.hf.linears import body_linears, heads
from fedtune.hf.pooling import choose_pooling, set_pooling
from fedtune.hf.tokenizer import load_tokenizer
from fedtune.model.adapters import Adapter
from fedtune.model.base import Base, context_of, dtype_of, reading, said_of
from fedtune.model.device import pick_device
from fedtune.model.encode import Encoded, encode
from fedtune.model.quantised import fitting, quantise, quantised
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.step_memory import Peak, peak_of
from fedtune.model.tunable import TunableModel, attach


def not_tried(train: TrainSettings | None, batch: int, length: int) -> None:
    """No network was run: sizes follow from config.json."""


@dataclass(frozen=True)
class Plan:
    """What would be trained, and the sizes that memory estimates need.

    trainable, total      counts of values
    shapes                tensor name -> shape, as `TunableModel.named`
    weights_bytes         the frozen base in memory
    layers, hidden, heads of the transformer
    """

    trainable: int
    total: int
    shapes: dict[str, tuple[int, ...]]
    weights_bytes: int
    context: int | None  # most tokens of an input, as far as config.json says
    layers: int
    hidden: int
    heads: int
    wide: int  # bytes of a value of the base, over 2
    trained_bytes: int  # of the trained tensors in memory
    head: str = ""  # as TunableModel.head
    of_head: frozenset[str] = frozenset()  # likewise
    keeps_front: bool = False  # likewise
    # bytes that live at once in a step, or without settings in a scoring pass, by batch and length; None
    # where that was not tried out
    peak: Peak = field(default=not_tried, compare=False, repr=False)

    @property
    def at_clients(self) -> Plan:
        """As of a tunable model: what is planned is what clients hold."""
        return self

    @property
    def named(self) -> dict[str, np.ndarray]:
        """Arrays of zeros with the shapes of `TunableModel.named` and without memory."""
        return {name: np.broadcast_to(np.float32(0), shape) for name, shape in self.shapes.items()}


def weightless(model: ModelSettings, task: str, labels: int | Sequence[str], device: str = "meta") -> Base:
    """The base from its config.json alone, on torch's meta device; of the labels, the number may do. Raises
    M301."""
    pick_device(model.device)
    if isinstance(labels, int):
        labels = [f"label {number}" for number in range(labels)]
    known = {"revision": model.revision} if model.revision else {}
    with reading(model.name):
        place = locate(model.name)
        config, chosen = load_config(place, task, labels, known)
        pooling, note = choose_pooling(model.pooling, place, task, chosen.kept, **known)
        with torch.device(device):
            net = AUTO[task].from_config(config, dtype=dtype_of(model))
    size, linear = sum(value.numel() for value in net.parameters()), body_linears(net, heads(net, task, ()))
    load = fitting(net, linear, pick_device(model.device)) if model.load == "auto" else model.load
    if load != "full":
        quantise(net, linear, load, dtype_of(model), torch.device(device))
    set_pooling(net, pooling)
    if task != "image-classify" and net.config.pad_token_id is None:
        net.config.pad_token_id = (
            0  # loading takes one from the tokenizer; a generative classifier will not run without any
        )
    base = Base(
        net.requires_grad_(False).eval(),
        None,
        task,
        tuple(labels),
        torch.device(device),
        model.name,
        None,
        frozenset(),
        notes=(*said_of(chosen), *((note,) if note else ())),
        kept_head=chosen.kept,
        pooling=pooling,
        load=load,
    )
    base.size = size
    return base


def encoded_without_weights(
    model: ModelSettings, task: str, rows: Sequence[Mapping[str, Any]], **how: Any
) -> Encoded:
    """Rows of a task without labels, encoded by the model's tokenizer; `how` as in `encode`. Raises M301, and
    what `encode` raises."""
    return encoded_by(model, weightless(model, task, 0), rows, **how)


def encoded_by(model: ModelSettings, base: Base, rows: Sequence[Mapping[str, Any]], **how: Any) -> Encoded:
    """Rows encoded by the tokenizer of a model whose `base` was made without weights."""
    with reading(model.name):
        base.tokenizer = load_tokenizer(
            locate(model.name), base.task, {"revision": model.revision} if model.revision else {}
        )
    return encode(rows, base, **how)


def plan(model: ModelSettings, adapter: Adapter, task: str, n_labels: int) -> Plan:
    """Attach the adapter to a weightless model. No weights are read, so a pretrained file that lacks a pooler
    is not noticed.

    Raises what `load` and `attach` raise: M301, M302, M306.
    """
    tunable = attach(weightless(model, task, n_labels), adapter, 0)
    return replace(plan_of(tunable), peak=peak_of(tunable))


def plan_of(tunable: TunableModel) -> Plan:
    """The sizes of a tunable model."""
    text = tunable.base.net.config.get_text_config()
    weights = sum(value.numel() * value.element_size() for value in tunable.base.weights.values())
    weights += sum(layer.scale_bytes for layer in quantised(tunable.base.net).values())
    shapes = {name: tuple(value.shape) for name, value in tunable.named.items()}
    context = None if tunable.base.task == "image-classify" else context_of(tunable.base.net)
    wide = 2 if next(iter(tunable.base.weights.values())).dtype == torch.float32 else 1
    return Plan(
        tunable.trainable,
        tunable.total,
        shapes,
        weights,
        context,
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        wide,
        sum(value.numel() * value.element_size() for value in tunable.named.values()),
        tunable.head,
        tunable.of_head,
        tunable.keeps_front,
    )


def training_bytes(plan: Plan, train: TrainSettings, length: int) -> dict[str, int]:
    """A client that trains with gradients, in bytes by what for.

    Activations are those of a step that was tried out without memory (fedtune.model.step_memory), or follow
    Korthikanti et al. 2022, eq. 1, scaled from 16 to 32 bits; with checkpointing every layer's input and one
    layer's activations (their section 5). They are an estimate: where memory is small, batches are halved.
    """
    moments = bool(train.momentum) if train.optimizer == "sgd" else 2
    activations = plan.peak(train, train.batch, length)
    if activations is None:
        layer = 34 * plan.hidden + 5 * plan.heads * length
        kept = layer + 2 * plan.hidden * plan.layers if train.checkpointing else layer * plan.layers
        activations = plan.wide * train.batch * length * kept
    return {
        "base model": plan.weights_bytes,
        "trained tensors, gradients, optimiser": 4 * plan.trainable * (2 + moments),
        "activations (estimate)": activations,
    }


def inference_bytes(plan: Plan, batch: int, length: int) -> dict[str, int]:
    """A client that only asks for losses, in bytes by what for: activations of a pass that was tried out
    without memory, or one layer's without the logits' place."""
    layer = plan.wide * batch * length * (34 * plan.hidden + 5 * plan.heads * length)
    found = plan.peak(None, batch, length)
    return {
        "base model": plan.weights_bytes,
        "trained tensors": plan.trained_bytes,
        "activations (estimate)": layer if found is None else found,
    }
