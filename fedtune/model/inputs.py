"""What comes into each adapted layer for a client's rows: means and mean squares, by which a router knows
whose rows a text is like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from fedtune.model.encode import Encoded
from fedtune.model.features import BATCH, through_net
from fedtune.model.forward import forward_only
from fedtune.model.loss import autocast
from fedtune.model.tunable import TunableModel


@dataclass
class Sums:
    """Of one layer: sum and sum of squares (2, in), float64, over so many tokens."""

    both: Any = 0.0
    tokens: float = 0.0


def input_moments(tunable: TunableModel, data: Encoded, most: int) -> tuple[dict[str, np.ndarray], float]:
    """Layer (as peft names it) -> (mean, mean square) over the tokens of the first `most` rows, padding left
    out; and how many tokens those are. Raises D205 without rows."""
    rows = min(most, len(data))
    batches = (data.collate(range(start, min(start + BATCH, rows))) for start in range(0, rows, BATCH))
    with watching(tunable) as sums, forward_only(tunable, data), autocast(tunable, "off"):
        through_net(tunable)(batches, lambda labels: None)
    means = {name: (layer.both / layer.tokens).cpu().numpy() for name, layer in sums.items() if layer.tokens}
    return means, max(layer.tokens for layer in sums.values())


@contextmanager
def watching(tunable: TunableModel) -> Iterator[dict[str, Sums]]:
    """What comes into the adapted layers in the forward passes meanwhile."""
    layers = {name: module for name, module in tunable.net.named_modules() if isinstance(module, LoraLayer)}
    sums = {name: Sums() for name in layers}
    mask: list[torch.Tensor | None] = [None]

    def begin(net: Any, arguments: Any, named: dict[str, Any]) -> None:
        mask[0] = named.get("attention_mask")

    def add(layer: Sums) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x, shown = inputs[0].double(), mask[0]
            if shown is None or shown.shape != x.shape[:2]:
                shown = torch.ones(x.shape[:-1], device=x.device)
            flat, real = x.reshape(-1, x.shape[-1]), shown.reshape(-1, 1).double()
            layer.both = layer.both + torch.stack([(flat * real).sum(0), (flat.square() * real).sum(0)])
            layer.tokens += float(real.sum())

        return hook

    hooks = [tunable.net.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [layers[name].register_forward_pre_hook(add(layer)) for name, layer in sums.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
