"""LoRA pairs of another rank or scale on the same tunable model, and parts of an adapter that do not train.

Clients of different ranks share one network in a process; each takes it at its own rank, as a site would
build it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedtune.errors import FedtuneError
from fedtune.model.adapters import Lora
from fedtune.model.tunable import TunableModel

A_END, B_END, CORE_END = ".lora_A.weight", ".lora_B.weight", ".lora_R.weight"
FACTORS = {"lora_A": (0, "out_features"), "lora_B": (1, "in_features")}  # where the rank is


def resize(tunable: TunableModel, rank: int, scale: float) -> None:
    """Give every LoRA pair this rank and scale; tensors of another rank than before are zero until they are
    written.

    Raises M306 where the adapter is not made of linear pairs.
    """
    settings = tunable.settings
    if not isinstance(settings, Lora) or not any(name.endswith(B_END) for name in tunable.named):
        raise FedtuneError(
            "M306",
            f"kind '{tunable.kind}' with a rank for each client",
            "LoRA pairs of linear layers",
            "set method.adapter.kind = 'lora'",
        )
    alpha = scale * (math.sqrt(rank) if settings.rslora else rank)
    if (settings.rank, settings.alpha) == (rank, alpha):
        return
    names = {id(value): name for name, value in tunable.named.items()}
    for layer in [module for module in tunable.net.modules() if isinstance(module, LoraLayer)]:
        for factor, (at, size) in FACTORS.items():
            linear = getattr(layer, factor)["default"]
            name = names.get(id(linear.weight))
            if linear.weight.shape[at] != rank:
                shape = (rank, linear.weight.shape[1]) if at == 0 else (linear.weight.shape[0], rank)
                linear.weight = nn.Parameter(
                    torch.zeros(shape, dtype=linear.weight.dtype, device=linear.weight.device)
                )
                setattr(linear, size, rank)
            if name:
                tunable.named[name] = linear.weight
        layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"] = rank, alpha, scale
    config = tunable.net.peft_config["default"]
    config.r, config.lora_alpha = rank, alpha
    tunable.settings = settings.model_copy(update={"rank": rank, "alpha": alpha})


def scale_of(tunable: TunableModel) -> float:
    """What a pair's product is multiplied by. Raises M306 for what is not LoRA."""
    settings = tunable.settings
    if not isinstance(settings, Lora):
        raise FedtuneError(
            "M306",
            f"an expert on an adapter of kind '{tunable.kind}'",
            "LoRA pairs of linear layers",
            "set method.adapter.kind = 'lora'",
        )
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def stack(
    tensors: Mapping[str, np.ndarray], residual: Mapping[str, np.ndarray], scale: float
) -> dict[str, np.ndarray]:
    """An adapter with frozen slices before its own: residual pairs (scale 1) become the first rows of A and
    columns of B.

    `residual` is named <module>.residual_A (n, k) and <module>.residual_B (d, n).
    """
    out = dict(tensors)
    for name in [name for name in residual if name.endswith(".residual_A")]:
        module = name.removesuffix(".residual_A")
        out[module + A_END] = np.concatenate([residual[name], tensors[module + A_END]], axis=0)
        out[module + B_END] = np.concatenate(
            [residual[module + ".residual_B"] / np.float32(scale), tensors[module + B_END]], axis=1
        )
    return out


def unstack(tensors: Mapping[str, np.ndarray], extra: int) -> dict[str, np.ndarray]:
    """The adapter's own slices, without the first `extra`."""
    cut = {
        name: value[extra:] if name.endswith(A_END) else value[:, extra:]
        for name, value in tensors.items()
        if name.endswith((A_END, B_END))
    }
    return {name: np.ascontiguousarray(cut.get(name, value)) for name, value in tensors.items()}


def freeze(tunable: TunableModel, names: Collection[str]) -> None:
    """Take tensors out of what is trained, for good: they stay as the seed made them."""
    for name in names:
        tunable.still[name] = tunable.named.pop(name).requires_grad_(False)


def thaw(tunable: TunableModel) -> None:
    """The inverse of `freeze`."""
    tunable.named.update(tunable.still)
    tunable.still.clear()
    for value in tunable.named.values():
        value.requires_grad_(True)


@contextmanager
def training_only(tunable: TunableModel, names: Collection[str], extra: int = 0) -> Iterator[None]:
    """Train these tensors alone for a while, and of LoRA pairs not the first `extra` slices.

    A slice without gradient stays as it is to the bit under SGD and Adam, as long as there is no weight
    decay.
    """
    whole = dict(tunable.named)
    hooks = [
        value.register_hook(masked(value, extra, at=0 if name.endswith(A_END) else 1))
        for name, value in whole.items()
        if extra and name in names and name.endswith((A_END, B_END))
    ]
    for name in whole.keys() - set(names):
        tunable.named.pop(name).requires_grad_(False)
    try:
        yield
    finally:
        tunable.named.clear()
        tunable.named.update({name: value.requires_grad_(True) for name, value in whole.items()})
        for hook in hooks:
            hook.remove()


@contextmanager
def on_top(
    tunable: TunableModel, beneath: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]
) -> Iterator[int]:
    """For a while, pairs `own` beside an adapter, of which nothing is lost: a tunable model of both ranks.
    Gives the rank of what is beneath, whose slices come first. Afterwards the model is as it was, and holds
    `beneath`.

    What `beneath` does not name is as the tunable model has it; pairs that `own` lacks are zero. Raises M306
    for what is not made of linear pairs.
    """
    scale, settings, frozen = scale_of(tunable), tunable.settings, sorted(tunable.still)
    assert isinstance(settings, Lora)
    thaw(tunable)
    held = {**tunable.read(), **beneath}
    added = next(value.shape[1] for name, value in own.items() if name.endswith(B_END))
    try:
        resize(tunable, settings.rank + added, scale)
        tunable.write({name: beside(name, value, own, added) for name, value in held.items()})
        yield settings.rank
    finally:
        resize(tunable, settings.rank, scale)
        config = tunable.net.peft_config["default"]
        tunable.settings, config.lora_alpha = settings, settings.alpha
        tunable.write(held)
        freeze(tunable, frozen)


def beside(name: str, value: np.ndarray, own: Mapping[str, np.ndarray], added: int) -> np.ndarray:
    """A factor with the slices of `own` behind its own."""
    if not name.endswith((A_END, B_END)):
        return value
    axis = 0 if name.endswith(A_END) else 1
    shape = (added, value.shape[1]) if axis == 0 else (value.shape[0], added)
    return np.concatenate([value, own.get(name, np.zeros(shape, np.float32))], axis)


@contextmanager
def with_cores(tunable: TunableModel, tensors: Mapping[str, np.ndarray]) -> Iterator[None]:
    """For a while, put the matrices <module>.lora_R.weight (r, r) of `tensors` between A and B, as tensors of
    the tunable model; nothing happens without any."""
    cores = {name: value for name, value in tensors.items() if name.endswith(CORE_END)}
    layers = (
        {
            id(layer.lora_A["default"].weight): layer
            for layer in tunable.net.modules()
            if isinstance(layer, LoraLayer)
        }
        if cores
        else {}
    )
    for name, value in cores.items():
        module = name.removesuffix(CORE_END)
        layer = layers[id(tunable.named[module + A_END])]
        core = nn.Linear(*value.shape, bias=False, device=layer.lora_A["default"].weight.device)
        core.weight = nn.Parameter(torch.from_numpy(value.copy()).to(core.weight.device))
        layer.lora_B["default"] = nn.Sequential(core, layer.lora_B["default"])
        tunable.named[name] = core.weight
    if cores:
        tunable.write({name: tensors[name] for name in tunable.named})  # B itself, which until here was B R
    try:
        yield
    finally:
        for name in cores:
            layer = layers[id(tunable.named[name.removesuffix(CORE_END) + A_END])]
            layer.lora_B["default"] = layer.lora_B["default"][1]
            del tunable.named[name]


def masked(value: torch.Tensor, extra: int, at: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that leaves the first `extra` slices along an axis without gradient."""
    keep = torch.ones(value.shape[at], device=value.device)
    keep[:extra] = 0
    keep = keep[:, None] if at == 0 else keep
    return lambda gradient: gradient * keep
