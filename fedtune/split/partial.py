"""Taking out of a network what a party does not hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.split.anatomy import Anatomy, Skip
from fedtune.split.cut import Cut, Role


class Absent(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Stands where a module with weights of another part stood."""

    def __init__(self, kept: nn.Parameter | None = None) -> None:
        super().__init__()
        nothing = torch.empty(0)
        nothing._is_hf_initialized = True
        self.patch_embeddings = PartialAnswer(
            projection=PartialAnswer(weight=nothing)
        )  # ViT reads a type here before it embeds
        self.bias = None
        self.weight = (
            nothing if kept is None else kept
        )  # ModernBERT looks at it on loading; a tail's output layer may be tied to it

    def forward(self, *args: Any, **named: Any) -> Any:
        raise RuntimeError("this part of the model is held by somebody else")


@dataclass
class PartialAnswer:
    projection: Any = None
    weight: Any = None


def strip(net: Any, anatomy: Anatomy, cut: Cut, holds: Collection[Role]) -> None:
    """Take out of a network what these parts do not hold. The tail of a tied model keeps the vocabulary's
    matrix in the embeddings' place."""
    blocks = net.get_submodule(anatomy.layers)
    mine = cut.held(holds, anatomy.blocks)
    for number, block in enumerate(blocks):
        if number not in mine:
            blocks[number] = Skip(block, anatomy.pairs)
    tied = net.all_tied_weights_keys if "tail" in holds else {}
    for role, paths in (("head", anatomy.front), ("tail", anatomy.rear)):
        for path in paths if role not in holds else ():
            keep = next(
                (net.get_parameter(source) for source in tied.values() if source == f"{path}.weight"), None
            )
            put(net, path, Absent(keep))
    names = dict(net.named_parameters(remove_duplicate=False))
    net.all_tied_weights_keys = {
        target: source
        for target, source in net.all_tied_weights_keys.items()
        if target in names and source in names
    }


def put(net: nn.Module, path: str, module: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    setattr(net.get_submodule(above), name, module)
