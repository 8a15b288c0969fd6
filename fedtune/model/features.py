"""What a task head reads of a client's rows, summed by class: what a head can start from before any
training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.hf.eval_mode import in_eval_mode
from fedtune.hf.probe import smallest
from fedtune.model.encode import Encoded
from fedtune.model.forward import forward_only
from fedtune.model.kept_front import behind_front, from_front
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.tunable import TunableModel

BATCH = 32  # rows in a forward pass
Each = Callable[[torch.Tensor], None]  # told a batch's labels after its forward pass
Through = Callable[[Iterable[dict[str, Any]], Each], None]  # runs batches through a network


def class_sums(
    tunable: TunableModel, data: Encoded, moments: bool = False, through: Through | None = None
) -> dict[str, np.ndarray]:
    """Means over the rows: `shares` (C,) of the classes, `norm` (1,) of a feature, `sums` (C, d) of unit
    features by class, and with `moments`
    (d, d) their second moments. float64; times the number of rows they can be added up.

    A feature is what the head's last matrix is multiplied with. `through` runs the batches where the network
    is not in one piece. Raises D205
    without rows.
    """
    classes, width = tunable.named[tunable.head].shape
    sums, shares, norm = np.zeros((classes, width)), np.zeros(classes), np.zeros(1)
    second = np.zeros((width, width))
    data = behind_front(tunable, data) if through is None else data
    with watching(tunable) as seen, forward_only(tunable, data), autocast(tunable, "off"):

        def each(labels: torch.Tensor) -> None:
            features = torch.cat([one.flatten(0, -2) for one in seen]).double().cpu().numpy()
            seen.clear()
            lengths = np.linalg.norm(features, axis=1, keepdims=True)
            unit = features / np.maximum(lengths, 1e-12)
            np.add.at(sums, labels.cpu().numpy(), unit)
            np.add.at(shares, labels.cpu().numpy(), 1.0)
            norm[0] += lengths.sum()
            if moments:
                second[:] += unit.T @ unit

        order = data.by_length()  # so that batches hold little padding
        batches = (data.collate(order[start : start + BATCH]) for start in range(0, len(order), BATCH))
        (through or through_net(tunable))(batches, each)
    means = {"norm": norm, "shares": shares, "sums": sums} | ({"moments": second} if moments else {})
    return {name: value / len(data) for name, value in means.items()}


def through_net(tunable: TunableModel) -> Through:
    """The tunable model's own network."""

    def run(batches: Iterable[dict[str, Any]], each: Each) -> None:
        for batch in batches:
            with from_front(tunable, batch) as rest:
                arguments, labels = inputs_of(tunable, rest)
                tunable.net(**arguments)
            each(labels)

    return run


def public_length(tunable: TunableModel) -> float:
    """How long a feature is, of an input that everybody knows: the least that shows the model at work."""
    with watching(tunable) as seen, torch.no_grad():
        with in_eval_mode(tunable.net):
            tunable.net(**smallest(tunable.base.net, tunable.base))
        return float(seen[-1].flatten(0, -2).double().norm(dim=1).mean())


@contextmanager
def watching(tunable: TunableModel) -> Iterator[list[torch.Tensor]]:
    """What the head's last matrix is given in the forward passes meanwhile, (B, d) each."""
    weight, seen = tunable.named[tunable.head], list[torch.Tensor]()
    module = next(
        module
        for module in tunable.base.net.modules()
        if isinstance(module, nn.Linear) and module.weight is weight
    )
    scores = list[torch.Tensor]()

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], said: torch.Tensor) -> None:
        seen.append(args[0].detach())
        scores[:] = [said.detach()]

    def choose(net: nn.Module, args: Any, said: Any) -> None:
        """Of a model that scores every token (B, T, C): the token whose scores are those of the text."""
        if seen and seen[-1].dim() == 3:
            at = (scores[-1] == said.logits[:, None]).all(-1).int().argmax(-1)
            seen[-1] = seen[-1][torch.arange(len(at), device=at.device), at]

    handles = [module.register_forward_hook(keep)]
    if isinstance(tunable.net, nn.Module):  # the parts of a split model send the rows that the head reads
        handles.append(tunable.net.register_forward_hook(choose))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
