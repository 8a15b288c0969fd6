"""Which parts of a network an adapter may touch: the task head, the linear layers, and parameters opened for
training."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import FedtuneError
from fedtune.hf import linears
from fedtune.model.adapters.base import WHOLE
from fedtune.model.base import Base

if TYPE_CHECKING:
    from fedtune.model.adapters.base import LayerAdapter

Named = dict[str, nn.Parameter]


def heads(base: Base) -> tuple[str, ...]:
    """Modules that start fresh."""
    return linears.heads(base.net, base.task, base.fresh)


def in_head(base: Base, name: str) -> bool:
    return linears.within(name, heads(base))


def head_parameters(base: Base) -> Named:
    """The task head, opened for training."""
    return open_for_training(base, {name for name in base.weights if in_head(base, name)})


def open_for_training(base: Base, names: set[str], as_held: bool = False) -> Named:
    """Replace parameters by float32 copies to train, or `as_held` by such of their own type, but for fresh
    ones; everywhere they are tied. The base's own stay untouched."""

    def copy(name: str) -> nn.Parameter:
        own = base.weights[name].detach()
        dtype = own.dtype if as_held and name not in base.fresh else torch.float32
        return nn.Parameter(own.to(dtype, copy=True))

    copies = {id(base.weights[name]): copy(name) for name in names}
    for module in base.net.modules():
        for key, value in module._parameters.items():
            if id(value) in copies:
                module._parameters[key] = copies[id(value)]
    return {name: copies[id(base.weights[name])] for name in names}


def linear_layers(base: Base) -> list[str]:
    """Names of the linear layers that peft adapts, without the task head and the output layer."""
    return linears.body_linears(base.net, heads(base))


def target_layers(base: Base, s: LayerAdapter) -> list[str]:
    """Full names of the modules that the settings mean: all-linear or endings of names, in the last blocks or
    all. Raises M302."""
    known = [
        name
        for name in linear_layers(base)
        if not any(name == whole or name.endswith("." + whole) for whole in s.modules_to_save)
    ]
    if not known:
        raise unfit(
            base,
            s.kind,
            "a model with linear layers (torch's Linear, or GPT-2's Conv1D) outside its task head",
            "choose another method.adapter.kind",
        )
    found: set[str] = set()
    for target in s.targets:
        hits = (
            known
            if target == "all-linear"
            else [name for name in known if name == target or name.endswith("." + target)]
        )
        if not hits:
            have = sorted({name.rpartition(".")[2] for name in known})
            raise FedtuneError(
                "M302",
                f"the target '{target}', which matches no linear layer of {base.name}",
                f"names such as {', '.join(have[:8])}",
                'correct method.adapter.targets or use ["all-linear"]',
            )
        found |= set(hits)
    blocks_of = block_numbers(known)
    count = max(blocks_of.values(), default=-1) + 1
    if s.last > count:
        raise FedtuneError(
            "M302",
            f"method.adapter.last = {s.last}",
            f"at most the {count} blocks of {base.name}",
            "lower it, or set it to 0 for all",
        )
    first = count - s.last if s.last else 0
    within = in_band(base, known, s.band)
    return [
        name
        for name in known
        if name in found and name in within and blocks_of.get(name, 0 if not s.last else -1) >= first
    ]


def block_numbers(names: Iterable[str]) -> dict[str, int]:
    """The block of every name that is in one."""
    return {name: int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))}


def in_band(base: Base, names: Collection[str], band: tuple[float, float]) -> set[str]:
    """Those in blocks i of n with band[0] <= i / n < band[1]; all, with what is in no block, for the whole
    depth. Raises M302 for a band without blocks."""
    if band == WHOLE:
        return set(names)
    blocks_of = block_numbers(names)
    count = max(blocks_of.values(), default=-1) + 1
    found = {name for name, block in blocks_of.items() if band[0] * count <= block < band[1] * count}
    if not found:
        raise FedtuneError(
            "M302",
            f"method.adapter.band = [{band[0]:g}, {band[1]:g}], in which none of the {count} blocks of "
            f"{base.name} lies",
            "a band of some blocks",
            "widen it",
        )
    return found


def narrows(base: Base, name: str) -> bool:
    """Whether a linear layer outside the attention has more inputs than outputs: the second half of a
    feed-forward part."""
    layer = base.net.get_submodule(name)
    if isinstance(layer, Conv1D):
        columns, rows = layer.weight.shape  # (in, out)
    else:
        rows, columns = layer.out_features, layer.in_features  # a quantised weight has another shape
    return bool(columns > rows) and not re.search(r"attn|attention", name)


def unfit(base: Base, kind: str, expected: str, do: str) -> FedtuneError:
    return FedtuneError("M306", f"kind '{kind}' with a {type(base.net).__name__}", expected, do)
