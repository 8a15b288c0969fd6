"""What a recipe would train, from config.json alone: the network is built without memory (torch's meta device)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedtune.model.base import AUTO, Base, load_config, locate, reading
from fedtune.model.bench import attach
from fedtune.model.settings import AdapterSettings, ModelSettings


@dataclass(frozen=True)
class Plan:
    """What would be trained, and the sizes that memory estimates need.

    trainable, total      counts of values
    shapes                tensor name -> shape, as `Bench.named`
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


def plan(model: ModelSettings, adapter: AdapterSettings, task: str, n_labels: int) -> Plan:
    """Attach the adapter to a weightless model. No weights are read, so a pretrained file that lacks a pooler is not noticed.

    Raises what `load` and `attach` raise: M301, M302, M306.
    """
    labels: Sequence[str] = [f"label {number}" for number in range(n_labels)]
    known = {"revision": model.revision} if model.revision else {}
    with reading(model.name):
        config = load_config(locate(model.name), task, labels, known)
        with torch.device("meta"):
            net = AUTO[task].from_config(config, dtype=getattr(torch, model.dtype))
    base = Base(net.requires_grad_(False).eval(), None, task, tuple(labels), torch.device("meta"), model.name, None, frozenset())
    bench = attach(base, adapter, 0)
    weights = sum(value.numel() * value.element_size() for value in base.weights.values())
    text = config.get_text_config()
    shapes = {name: tuple(value.shape) for name, value in bench.named.items()}
    context = getattr(text, "max_position_embeddings", None)
    return Plan(bench.trainable, bench.total, shapes, weights, context, text.num_hidden_layers, text.hidden_size, text.num_attention_heads)
