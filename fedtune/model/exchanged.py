"""A network of somebody else's as the other end of a tunable model: the same tensors under the same names,
and the same answers with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from fedtune.errors import FedtuneError
from fedtune.hf.eval_mode import in_eval_mode
from fedtune.hf.probe import image_size, texts
from fedtune.model.adapters.wrap import file_name
from fedtune.model.open_tensors import write_into
from fedtune.model.tunable import TunableModel

ALIKE = 0.05  # of the greatest logit: bfloat16 beside float32 stays below it
MOST = 256  # logits that are compared


def exchanged(net: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    """A network's parameters by the names under which they travel (peft's own file's), with these values
    written into them. Raises M305 where the network trains others, or has some of another shape."""
    every = {file_name(name): value for name, value in net.named_parameters()}
    trained = {name for name, value in every.items() if value.requires_grad}
    odd = sorted((tensors.keys() - every.keys()) | (trained - tensors.keys()))
    odd = odd or sorted(name for name, value in tensors.items() if tuple(every[name].shape) != value.shape)
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
    """An input, what the model says of it, and the scales of its LoRA pairs: a model with the same has the
    same base and the same adapter."""
    base = tunable.base
    if base.task == "image-classify":
        channels = getattr(base.net.config, "num_channels", None) or 3
        asked: dict[str, Any] = {"pixels": [1, channels, *image_size(base.net.config, base.tokenizer)]}
    else:
        asked = {"ids": texts(base.tokenizer, base.context)[0]}
    return asked | {"said": answer_to(tunable.net, asked), "scales": scales(tunable.net)}


def require_alike(net: Any, asked: Mapping[str, Any]) -> None:
    """Raises M304 where a network answers a probe otherwise, with the same tensors, or scales them otherwise:
    that shows in no answer as long as a factor is zero."""
    said, want = np.asarray(answer_to(net, asked)), np.asarray(asked["said"])
    same = said.shape == want.shape and np.abs(said - want).max() <= ALIKE * max(np.abs(want).max(), 1e-6)
    if same and scales(net) == asked["scales"]:
        return
    raise FedtuneError(
        "M304",
        f"a script's model that scales its LoRA by {scales(net)}"
        if same
        else "a script's model that answers otherwise than the worker's, with the same tensors",
        f"the recipe's {asked['scales']}" if same else "the same base and the same adapter",
        "make the script's model of the recipe's [model] and [method.adapter]",
    )


def scales(net: Any) -> list[float]:
    """By what LoRA's products are multiplied, each number once."""
    layers = (module for module in net.modules() if isinstance(module, LoraLayer))
    return sorted({float(scale) for layer in layers for scale in layer.scaling.values()})


def answer_to(net: Any, asked: Mapping[str, Any]) -> list[float]:
    """The first of the last logits of one input."""
    first = next(iter(net.parameters()))
    if "pixels" in asked:
        inputs = {"pixel_values": torch.zeros(*asked["pixels"], device=first.device)}
    else:
        ids = torch.tensor([asked["ids"]], device=first.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in net.parameters())
    with in_eval_mode(net), torch.no_grad(), torch.autocast(first.device.type, torch.bfloat16, enabled=half):
        said = net(**inputs).logits
    return [float(x) for x in said.float().reshape(-1, said.shape[-1])[-1, :MOST].cpu()]
