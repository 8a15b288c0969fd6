"""A network's own weights as one long vector, of which some positions are trained: what LT-SFT (Ansell et al.
2022, arXiv:2110.07560) does to a model.

The vector holds the tensors that are opened for training, but for the task head, by name and each in the
order of rows. Positions are ascending places in it, (n,) int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fedtune.model.lora_ranks import training_only
from fedtune.model.sparse_support import greatest
from fedtune.model.tunable import TunableModel


def body_of(tunable: TunableModel) -> dict[str, torch.nn.Parameter]:
    """The tensors of the vector, in their order."""
    head = tunable.of_head
    return {name: value for name, value in tunable.named.items() if name not in head}


def pieces(tunable: TunableModel, positions: np.ndarray) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """Of each tensor that has some of the positions: its name, which of them, and their places in it."""
    start = 0
    for name, value in body_of(tunable).items():
        low, high = np.searchsorted(positions, (start, start + value.numel()))
        if high > low:
            places = torch.from_numpy(positions[low:high] - start)
            yield name, slice(int(low), int(high)), places.to(value.device)
        start += value.numel()


def base_values(tunable: TunableModel, positions: np.ndarray) -> np.ndarray:
    """What the base has at the positions, (n,) float32."""
    found = np.empty(positions.size, np.float32)
    for name, some, places in pieces(tunable, positions):
        weight = tunable.base.weights[name].detach().reshape(-1)
        found[some] = weight[places].float().cpu().numpy()
    return found


def read_at(tunable: TunableModel, positions: np.ndarray) -> np.ndarray:
    """The trained values at the positions, (n,) float32."""
    found = np.empty(positions.size, np.float32)
    for name, some, places in pieces(tunable, positions):
        found[some] = tunable.named[name].detach().reshape(-1)[places].cpu().numpy()
    return found


def write_at(tunable: TunableModel, positions: np.ndarray, values: np.ndarray) -> None:
    """The base, with these values (n,) at the positions."""
    with torch.no_grad():
        for name, value in body_of(tunable).items():
            value.copy_(tunable.base.weights[name])
        for name, some, places in pieces(tunable, positions):
            value = tunable.named[name]
            value.view(-1)[places] = torch.from_numpy(values[some]).to(value.device)


def most_moved(tunable: TunableModel, count: int) -> np.ndarray:
    """The `count` positions that are farthest from the base; of equally far ones, those that come first."""
    with torch.no_grad():
        moves = [
            (value - tunable.base.weights[name].float()).abs().reshape(-1).cpu().numpy()
            for name, value in body_of(tunable).items()
        ]
    return greatest(np.concatenate(moves), count)


@contextmanager
def training_at(tunable: TunableModel, positions: np.ndarray) -> Iterator[None]:
    """Train the positions and the task head alone for a while. What has no gradient stays as it is to the bit
    under SGD and Adam, as long as there is no weight decay."""
    chosen = {name: places for name, _, places in pieces(tunable, positions)}
    hooks = [
        tunable.named[name].register_hook(cleared_but_for(tunable.named[name], places))
        for name, places in chosen.items()
    ]
    try:
        with training_only(tunable, chosen.keys() | tunable.of_head):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def cleared_but_for(value: torch.Tensor, places: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that leaves these places of a tensor alone, to the bit, and clears the rest."""
    rest = torch.ones(value.numel(), dtype=torch.bool, device=value.device)
    rest[places] = False
    rest = rest.view(value.shape)
    return lambda gradient: gradient.masked_fill(rest, 0.0)
