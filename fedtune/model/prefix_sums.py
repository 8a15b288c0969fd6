"""What a client's texts look like to a network: means of all layers' inputs over a prefix, folded to a few
numbers, and how these go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from fedtune.model.adapters.wrap import file_name
from fedtune.model.encode import Encoded
from fedtune.model.features import BATCH
from fedtune.model.forward import forward_only
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.objectives.base import IGNORED
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

PLACES = 16  # of a text at most, evenly from the first to the last that counts


def leveled(x: torch.Tensor) -> torch.Tensor:
    """Each token's vector (..., d) at mean square 1, float32: what it points to, not how long it is."""
    wide = x.float()
    result: torch.Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12)
    return result


def prefix_sums(
    tunable: TunableModel,
    data: Encoded,
    most: int,
    folds: Mapping[str, tuple[np.ndarray, np.ndarray]],
    width: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of the first `most` rows: the mean (width,) and the upper triangle of the mean of products, float64;
    and how many texts those are. `folds`: bucket and sign of each number that comes into a layer, by its
    name in peft's files.

    In a text that is continued, places are the tokens whose next one carries the loss; otherwise there is
    one, its end. Places of a text count as one, texts alike. Raises D205 without rows.
    """
    order = [row for row in data.by_length() if row < most]
    mean, products, texts = np.zeros(width), np.zeros((width, width)), 0
    with watching(tunable, folds, width) as seen, forward_only(tunable, data), autocast(tunable, "off"):
        for start in range(0, len(order), BATCH):
            arguments, labels = inputs_of(tunable, data.collate(order[start : start + BATCH]))
            seen.begin(arguments.get("attention_mask"))
            tunable.net(**arguments)
            rows, counts = seen.at(places(labels, tunable.base.task))
            weights = np.repeat(1 / counts, counts)[:, None]
            mean += (rows * weights).sum(0)
            products += (rows * weights).T @ rows
            texts += len(counts)
    return mean / texts, (products / texts)[np.triu_indices(width)], texts


def places(labels: torch.Tensor, task: str) -> list[torch.Tensor]:
    """Of each text, the numbers of the tokens that count."""
    if task not in LM_TASKS:
        return [torch.tensor([-1])] * len(labels)
    found = []
    for row in (labels.flatten(0, 1) if labels.ndim == 3 else labels).cpu():
        told = (row[1:] != IGNORED).nonzero()[:, 0]
        told = told if len(told) else torch.tensor([-1])
        count = min(PLACES, len(told))
        found.append(told[torch.linspace(0, len(told) - 1, count).round().long()])
    return found


class Seen:
    """Of one batch: the sum of all layers' inputs over the prefix up to each token, folded."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.mask: Any = None
        self.total: Any = None

    def begin(self, mask: Any) -> None:
        self.mask, self.total = mask, None

    def add(self, x: torch.Tensor, buckets: torch.Tensor, signs: torch.Tensor) -> None:
        if x.ndim != 3 or (self.total is not None and self.total.shape[:2] != x.shape[:2]):
            return  # of a layer behind all tokens, such as a pooler
        if self.total is None:
            self.total = x.new_zeros(*x.shape[:2], self.width, dtype=torch.float32)
        self.total.index_add_(-1, buckets.to(x.device), leveled(x) * signs.to(x.device))

    def at(self, places: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Rows (places of all texts, width), float64, and how many places each text has."""
        real = torch.ones(self.total.shape[:2], device=self.total.device) if self.mask is None else self.mask
        real = real.double()[..., None]
        means = (self.total.double() * real).cumsum(1) / real.cumsum(1).clamp_min(1)
        rows = torch.cat([text[place.to(text.device)] for text, place in zip(means, places, strict=True)])
        return rows.cpu().numpy(), np.array([len(place) for place in places])


@contextmanager
def watching(
    tunable: TunableModel, folds: Mapping[str, tuple[np.ndarray, np.ndarray]], width: int
) -> Iterator[Seen]:
    seen, handles = Seen(width), []

    def watch(buckets: torch.Tensor, signs: torch.Tensor) -> Any:
        return lambda layer, args: seen.add(args[0].detach(), buckets, signs)

    for name, layer in tunable.net.named_modules():
        if isinstance(layer, LoraLayer) and file_name(name) in folds:
            buckets, signs = map(torch.from_numpy, folds[file_name(name)])
            handles.append(layer.register_forward_pre_hook(watch(buckets, signs)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
