"""A network of somebody else's as the other end of a tunable model: the same tensors under the same names,
and the same answers with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.hf.probe import image_size, texts
from fedtune.model.adapters.wrap import file_name
from fedtune.model.open_tensors import write_into
from fedtune.model.tunable import TunableModel

SHAKEN = 0.02  # height of the wave: enough to see a wrong scale behind a factor that is zero
ALIKE = 0.05  # of the greatest logit: bfloat16 beside float32 stays below it
MOST = 256  # logits that are compared


def exchanged(net: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    """A network's parameters by the names under which they travel (peft's own file's), with these values
    written into them. Raises M305 where the network trains others, or has some of another shape."""
    every = {file_name(name): value for name, value in net.named_parameters()}
    trained = {name for name, value in every.items() if value.requires_grad}
    odd = sorted((tensors.keys() - every.keys()) | (trained - tensors.keys()))
    odd = odd or [name for name, value in tensors.items() if tuple(every[name].shape) != value.shape]
    if odd:
        whose = "that the recipe does not train" if odd[0] in trained else "that the script's model lacks"
        if odd[0] in tensors and odd[0] in every:
            whose = f"of shape {tuple(every[odd[0]].shape)}, in the recipe {tensors[odd[0]].shape}"
        raise FedtuneError(
            "M305",
            f"'{odd[0]}' {whose} ({len(odd)} such tensors)",
            "a model with the recipe's [model] and [method.adapter]",
            "make the script's model of the same base and the same adapter",
        )
    named = {name: every[name] for name in sorted(tensors)}
    write_into(named, tensors)
    return named


@contextmanager
def only_these(named: Mapping[str, torch.nn.Parameter], still: Sequence[str]) -> Iterator[None]:
    """Parameters of which those named rest meanwhile."""
    before = {name: value.requires_grad for name, value in named.items()}
    for name, value in named.items():
        value.requires_grad_(name not in still)
    try:
        yield
    finally:
        for name, value in named.items():
            value.requires_grad_(before[name])


def probe(tunable: TunableModel) -> dict[str, Any]:
    """An input, and what the model says of it while its adapter is shaken: a model that says the same has the
    same base, the same adapter and the same scale."""
    base = tunable.base
    if base.task == "image-classify":
        channels = getattr(base.net.config, "num_channels", None) or 3
        asked: dict[str, Any] = {"pixels": [1, channels, *image_size(base.net.config, base.tokenizer)]}
    else:
        asked = {"ids": texts(base.tokenizer, base.context)[0]}
    named = {**tunable.named, **tunable.still}
    return asked | {"said": shaken_answer(tunable.net, named, asked)}


def require_alike(net: Any, named: Mapping[str, torch.nn.Parameter], asked: Mapping[str, Any]) -> None:
    """Raises M304 where a network answers a probe otherwise."""
    said, want = np.asarray(shaken_answer(net, named, asked)), np.asarray(asked["said"])
    if said.shape != want.shape or not np.abs(said - want).max() <= ALIKE * max(np.abs(want).max(), 1e-6):
        raise FedtuneError(
            "M304",
            "a script's model that answers otherwise than the worker's, with the same tensors",
            "the same base, the same adapter, the same scale (lora_alpha)",
            "make the script's model of the recipe's [model] and [method.adapter]",
        )


def shaken_answer(net: Any, named: Mapping[str, torch.nn.Parameter], asked: Mapping[str, Any]) -> list[float]:
    """The last logits of one input, with a wave added to the trained tensors, which are then as before."""
    before = {name: value.detach().clone() for name, value in named.items()}
    first = next(iter(net.parameters()))
    if "pixels" in asked:
        inputs = {"pixel_values": torch.zeros(*asked["pixels"], device=first.device)}
    else:
        ids = torch.tensor([asked["ids"]], device=first.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = net.training
    try:
        with torch.no_grad(), torch.autocast(first.device.type, torch.bfloat16, enabled=half(net)):
            for value in named.values():
                wave = torch.arange(value.numel(), device=value.device, dtype=torch.float32).cos()
                value.add_(SHAKEN * wave.reshape(value.shape).to(value.dtype))
            said = net.eval()(**inputs).logits
    finally:
        with torch.no_grad():
            for name, value in named.items():
                value.copy_(before[name])
        net.train(training)
    return [float(x) for x in said.float().reshape(-1, said.shape[-1])[-1, :MOST].cpu()]


def half(net: Any) -> bool:
    return any(value.dtype in (torch.float16, torch.bfloat16) for value in net.parameters())
