"""Sparse supports that are chosen again from the weights as they have become (LIFT, Liu et al. 2025,
arXiv:2506.00772).

A layer has a vector of values for each stage. The first stage's positions follow from the base, a later one's
from the base and the values of the stages before it, which rest by then: so they are the same for everybody
who has those values, no index travels, and a stage's values add up over clients as the first one's do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from fedtune.model.adapters.wrap import file_name
from fedtune.model.sparse_support import INDICES, VALUES, Choice, sparse_layers

STAGE = "stage"  # how the vectors of later stages are called, with their number, beside peft's "default"


class Supports:
    """The positions of one layer's stages, made when they are needed and kept while the values before them
    stay."""

    def __init__(self, layer: Any, name: str, stages: int, choose: Choice) -> None:
        self.layer, self.name, self.choose = layer, name, choose
        first = layer.shira_weight["default"]
        for number in range(1, stages):
            layer.shira_weight[f"{STAGE}{number}"] = torch.nn.Parameter(torch.zeros_like(first))
        self.stages = stages
        self.known: dict[int, tuple[tuple[int, ...], str, torch.Tensor]] = {}

    def values(self, number: int) -> torch.nn.Parameter:
        value: torch.nn.Parameter = self.layer.shira_weight[f"{STAGE}{number}" if number else "default"]
        return value

    def of(self, number: int) -> torch.Tensor:
        """Positions of a stage in the flat weight, ascending: (n,) int64."""
        if not number or self.values(0).is_meta:  # without numbers, any positions do
            positions: torch.Tensor = self.layer.positions
            return positions
        versions = tuple(self.values(earlier)._version for earlier in range(number))
        held = self.known.get(number)
        if held and held[0] == versions:
            return held[2]
        digest = hashlib.sha256()
        for earlier in range(number):
            digest.update(self.numbers(earlier).data)
        if not held or held[1] != digest.hexdigest():
            chosen = self.choose(self.name, self.weight_before(number), self.values(0).numel())
            held = versions, digest.hexdigest(), torch.from_numpy(chosen).to(self.layer.positions.device)
        self.known[number] = (versions, *held[1:])
        return held[2]

    def numbers(self, number: int) -> np.ndarray:
        return np.ascontiguousarray(self.values(number).detach().to("cpu", torch.float32).numpy())

    def weight_before(self, number: int) -> np.ndarray:
        """The weight with what the stages before this one changed, (rows, columns) float64."""
        weight = self.layer.get_base_layer().weight.detach()
        flat: np.ndarray = weight.to("cpu", torch.float64, copy=True).numpy().reshape(-1)
        for earlier in range(number):
            flat[self.of(earlier).cpu().numpy()] += self.numbers(earlier)
        return flat.reshape(tuple(weight.shape))

    def begun(self, number: int) -> bool:
        """Whether a stage changes anything, or is about to: one that is neither trained nor anything but zero
        does not, and has no positions yet."""
        value = self.values(number)
        if not number or value.is_meta:
            return True
        return (self.layer.training and value.requires_grad) or bool(value.detach().any())

    def delta(self) -> torch.Tensor:
        """The change of the weight, dense (rows, columns)."""
        layer = self.layer
        flat = layer.shira_weight["default"].new_zeros(layer.out_features * layer.in_features)
        for number in range(self.stages):
            if self.begun(number):
                flat = flat.scatter_add(0, self.of(number), self.values(number) * layer.scaling["default"])
        return flat.view(layer.out_features, layer.in_features)


def with_stages(net: Any, stages: int, choose: Choice) -> dict[str, Any]:
    """Give a network's sparse layers values for later stages, by the names that these have in files; {} where
    there is one stage."""
    made: dict[str, Any] = {}
    for name, layer in sparse_layers(net).items() if stages > 1 else ():
        supports = Supports(layer, name, stages, choose)
        vars(layer)["supports"] = supports  # no submodule

        def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
            change: torch.Tensor = self.supports.delta()
            return change

        layer.get_delta_weight = MethodType(get_delta_weight, layer)
        for number in range(1, stages):
            made[file_name(name + VALUES) + f".{STAGE}{number}"] = supports.values(number)
    return made


def stage_of(name: str) -> int | None:
    """The stage whose values a tensor holds; None for one that is no part of a support.

    >>> [stage_of(name) for name in ("a.shira_weight", "a.shira_weight.stage2", "classifier.weight")]
    [0, 2, None]
    """
    if name.endswith(VALUES):
        return 0
    front, _, last = name.rpartition(f".{STAGE}")
    return int(last) if front.endswith(VALUES) else None


def is_staged(net: Any) -> bool:
    return any("supports" in vars(layer) for layer in sparse_layers(net).values())


def support_print(net: Any, number: int) -> np.ndarray:
    """What parties that train a stage must agree on: the SHA-256 of its positions as (16,) whole numbers of
    16 bits, float32; zeros for the first stage, which goes with the base."""
    if not number:
        return np.zeros(16, np.float32)
    total = hashlib.sha256()
    for name, layer in sorted(sparse_layers(net).items()):
        total.update(name.encode())
        total.update(layer.supports.of(number).cpu().numpy().astype("<i8").data)
    return np.frombuffer(total.digest(), "<u2").astype(np.float32)


def save_as_one_support(net: Any, folder: Path) -> None:
    """Rewrite what peft saved as one support with the positions of all stages, and as many values as its rank
    times the stages has. Where stages share positions, others with a change of zero make up the number."""
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = json.loads(settings.read_text())
    held = {name: value for name, value in load_file(str(file)).items() if not stage_of(name)}
    for name, layer in sparse_layers(net).items():
        with torch.no_grad():
            change = layer.supports.delta().cpu().numpy().reshape(-1)
        stages = range(layer.supports.stages)
        begun = [layer.supports.of(number).cpu().numpy() for number in stages if layer.supports.begun(number)]
        used = np.unique(np.concatenate(begun))
        more = len(stages) * layer.supports.values(0).numel() - used.size
        rest = np.setdiff1d(np.arange(change.size), used)[:more]
        places = np.sort(np.concatenate([used, rest]))
        held[file_name(name + VALUES)] = change[places].astype(np.float32)
        held[file_name(name + INDICES)] = np.stack(np.divmod(places, layer.in_features)).astype(np.int32)
    save_file(held, str(file), metadata={"format": "pt"})
    config["r"] *= len(stages)
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def in_turn(names: Iterable[str], stage: int) -> frozenset[str]:
    """What is trained in a stage: its values, and what is no part of a support."""
    return frozenset(name for name in names if stage_of(name) in (stage, None))
