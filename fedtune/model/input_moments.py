"""What adapted layers are given on a client's rows: means and second moments, to make a start of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from peft.tuners.lora import LoraLayer

from fedtune.model.adapters.wrap import file_name
from fedtune.model.encode import Encoded
from fedtune.model.features import BATCH
from fedtune.model.forward import forward_only
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.tunable import TunableModel

ROWS = 256  # of a client, the first ones: means of inputs move little with more


def input_moments(tunable: TunableModel, data: Encoded) -> dict[str, np.ndarray]:
    """Means over the tokens of a client's rows, padding left out: <module>.mean (k,) and <module>.second
    (k, k) of each layer with a LoRA pair, float64. Raises D205 without rows."""
    order = [row for row in data.by_length() if row < ROWS]
    with watching(tunable) as (sums, shown), forward_only(tunable, data), autocast(tunable, "off"):
        for start in range(0, len(order), BATCH):
            arguments, _ = inputs_of(tunable, data.collate(order[start : start + BATCH]))
            shown(arguments.get("attention_mask"))
            tunable.net(**arguments)
    made: dict[str, np.ndarray] = {}
    for module, (count, first, second) in sums.items():
        made[f"{module}.mean"], made[f"{module}.second"] = first / count, second / count
    return made


Sums = dict[str, tuple[int, np.ndarray, np.ndarray]]  # tokens, sum (k,), sum of products (k, k)


@contextmanager
def watching(tunable: TunableModel) -> Iterator[tuple[Sums, Callable[[Any], None]]]:
    """Sums of what layers are given meanwhile, and a function to say which tokens of the next batch count."""
    sums: Sums = {}
    mask: list[Any] = [None]

    def watch(module: str) -> Callable[[Any, Any], None]:
        def see(layer: Any, args: Any) -> None:
            value, kept = args[0].detach(), mask[0]
            if kept is not None and value.ndim == 3 and value.shape[:2] == kept.shape:
                value = value[kept.bool()]
            value = value.flatten(0, -2).double().cpu().numpy()
            count, first, second = sums.get(module, (0, 0.0, 0.0))
            sums[module] = (count + len(value), first + value.sum(0), second + value.T @ value)

        return see

    def show(kept: Any) -> None:
        mask[0] = kept

    handles = [
        layer.register_forward_pre_hook(watch(file_name(name)))
        for name, layer in tunable.net.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    try:
        yield sums, show
    finally:
        for handle in handles:
            handle.remove()
