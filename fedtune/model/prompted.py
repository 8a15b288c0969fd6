"""A bench for a model that is split: its last part opened for training, and soft prompts of which the caller's network says where they enter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from fedtune.errors import FedtuneError
from fedtune.model.base import AUTO, Base, load_config, locate, reading
from fedtune.model.bench import Bench, detach, snapshot
from fedtune.model.encode import IGNORED, Encoded
from fedtune.model.kinds import opened
from fedtune.model.settings import AdapterSettings, ModelSettings

PROMPTS = "prompts"  # their name among the trained tensors


def attach_tail(base: Base, names: Collection[str], prompts: int, width: int, seed: int, net: Callable[[torch.nn.Parameter | None], Any]) -> Bench:
    """Open these parameters, make prompts (P, d) from `seed` alone, and run the bench by what `net` makes of the prompts.

    Drawn as other prompts are: uniformly from +-sqrt(6 / (2 d)) (Jia et al. 2022 for ViT-B/16).
    """
    if base.attached is not None:
        detach(base.attached)
    before = snapshot(base.net)
    named: dict[str, torch.nn.Parameter] = dict(opened(base, set(names)))
    if prompts:
        draw = torch.Generator().manual_seed(seed)
        reach = (3.0 / width) ** 0.5
        named[PROMPTS] = torch.nn.Parameter(((2 * torch.rand(prompts, width, generator=draw) - 1) * reach).to(base.device))
    named = {name: named[name] for name in sorted(named)}
    bench = Bench(base, AdapterSettings(kind="full", only=tuple(sorted(names))), net(named.get(PROMPTS)), named, before, base.size + prompts * width)
    base.attached = bench
    return bench


def weightless(model: ModelSettings, task: str, n_labels: int) -> Base:
    """The base from its config.json alone, on torch's meta device. Raises M301."""
    labels: Sequence[str] = [f"label {number}" for number in range(n_labels)]
    known = {"revision": model.revision} if model.revision else {}
    with reading(model.name):
        config = load_config(locate(model.name), task, labels, known)
        with torch.device("meta"):
            net = AUTO[task].from_config(config, dtype=getattr(torch, model.dtype))
    return Base(net.requires_grad_(False).eval(), None, task, tuple(labels), torch.device("meta"), model.name, None, frozenset())


def blank_batch(base: Base, length: int) -> dict[str, torch.Tensor]:
    """One example of no content on the base's device, as the network's arguments."""
    config = base.net.config
    if base.task != "image-classify":
        return {"input_ids": torch.zeros(1, length, dtype=torch.long, device=base.device)}
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size, config.image_size)
    return {"pixel_values": torch.zeros(1, config.num_channels, *size, device=base.device)}


def subset(encoded: Encoded, kept: Sequence[int]) -> Encoded:
    """Some of a client's examples, renumbered; what was counted of all of them stays."""
    return replace(encoded, examples=[encoded.examples[number] for number in kept], collate=lambda numbers: encoded.collate([kept[n] for n in numbers]))


def longest(encoded: Encoded) -> int:
    return max(encoded.length(number) for number in range(len(encoded)))


def padded(batch: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """A batch of texts at a length that does not depend on its neighbours; the ids of what is masked do not matter."""
    fill = {"labels": IGNORED}
    return {name: pad(value, (0, length - value.shape[1]), value=fill.get(name, 0)) if value.ndim == 2 else value for name, value in batch.items()}


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in float32 over all labels that are not -100: logits (..., C), labels (...)."""
    return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum")


def check_context(tokens: int, prompts: int, context: int | None) -> None:
    """Prompts in front of a decoder's text take places of its context. Raises D207."""
    if context is not None and tokens + prompts > context:
        found = f"{tokens} tokens and {prompts} prompts (method.prompts)"
        raise FedtuneError("D207", found, f"at most the model's context of {context} tokens", f"set data.max_length to {context - prompts} or less")
