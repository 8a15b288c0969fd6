"""A tunable model for a model that is split: its ends opened for training, and soft prompts of which the
caller's network says where they enter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy, pad

from fedtune.errors import FedtuneError
from fedtune.hf.draws import own_draws
from fedtune.model.adapters import Adapter, Full, Lora
from fedtune.model.adapters.layers import linear_layers, open_for_training
from fedtune.model.adapters.wrap import peft_arguments, plain, with_peft
from fedtune.model.base import Base
from fedtune.model.encode import Encoded
from fedtune.model.objectives.base import IGNORED
from fedtune.model.tunable import TunableModel

PROMPTS = "prompts"  # their name among the trained tensors


def attach_split(
    base: Base,
    named: dict[str, torch.nn.Parameter],
    settings: Adapter,
    prompts: int,
    width: int,
    seed: int,
    before: Any,
) -> TunableModel:
    """A tunable model of what was opened on a base (see `open_tail`, `add_lora`), with prompts (P, d) made
    from `seed` alone; its `net` is the caller's to set.

    Drawn as other prompts are: uniformly from +-sqrt(6 / (2 d)) (Jia et al. 2022 for ViT-B/16). `before` is
    the base's `snapshot`.
    """
    if prompts:
        draw = torch.Generator().manual_seed(seed)
        reach = (3.0 / width) ** 0.5
        named = {
            **named,
            PROMPTS: torch.nn.Parameter(
                ((2 * torch.rand(prompts, width, generator=draw) - 1) * reach).to(base.device)
            ),
        }
    named = {name: named[name] for name in sorted(named)}
    added = sum(value.numel() for name, value in named.items() if plain(name) not in base.weights)
    tunable = TunableModel(base, settings, base.net, named, before, base.size + added)
    base.attached = tunable
    return tunable


def open_tail(base: Base, names: Collection[str]) -> tuple[dict[str, torch.nn.Parameter], Adapter]:
    """These parameters themselves, as float32 copies."""
    return dict(open_for_training(base, set(names))), Full(only=tuple(sorted(names)))


def add_lora(
    base: Base, rank: int, within: Collection[str], seed: int
) -> tuple[dict[str, torch.nn.Parameter], Adapter]:
    """LoRA on the linear layers below these modules, with alpha = 2 rank, and the task head. Raises M306
    where there is no such layer."""
    targets = [name for name in linear_layers(base) if any(name.startswith(f"{path}.") for path in within)]
    if not targets:
        raise FedtuneError(
            "M306",
            f"method.lora_rank = {rank} with no block on the client's side",
            "a block in head or tail",
            "set method.head or method.tail",
        )
    with own_draws(seed, base.device):
        _, named = with_peft(
            base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **peft_arguments(base))
        )
    for value in named.values():
        value.data = value.data.float()
    return dict(named), Lora(rank=rank, alpha=2.0 * rank, targets=tuple(targets))


def blank_image(base: Base) -> dict[str, torch.Tensor]:
    """One image of no content on the base's device, as the network's arguments."""
    config = base.net.config
    size = (
        config.image_size
        if isinstance(config.image_size, (list, tuple))
        else (config.image_size, config.image_size)
    )
    return {"pixel_values": torch.zeros(1, config.num_channels, *size, device=base.device)}


def subset(encoded: Encoded, kept: Sequence[int]) -> Encoded:
    """Some of a client's examples, renumbered; what was counted of all of them stays."""
    return replace(
        encoded,
        examples=[encoded.examples[number] for number in kept],
        collate=lambda numbers: encoded.collate([kept[n] for n in numbers]),
    )


def longest(encoded: Encoded) -> int:
    return max(encoded.length(number) for number in range(len(encoded)))


def padded(batch: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """A batch of texts at a length that does not depend on its neighbours; the ids of what is masked do not
    matter."""
    fill = {"labels": IGNORED}
    return {
        name: pad(value, (0, length - value.shape[1]), value=fill.get(name, 0)) if value.ndim == 2 else value
        for name, value in batch.items()
    }


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in float32 over all labels that are not -100: logits (..., C), labels (...)."""
    return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum")


def check_context(tokens: int, prompts: int, context: int | None) -> None:
    """Prompts in front of a decoder's text take places of its context. Raises D207."""
    if context is not None and tokens + prompts > context:
        found = f"{tokens} tokens and {prompts} prompts (method.prompts)"
        raise FedtuneError(
            "D207",
            found,
            f"at most the model's context of {context} tokens",
            f"set data.max_length to {context - prompts} or less",
        )
