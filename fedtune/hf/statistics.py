"""Buffers that training would change: running statistics belong to the pretrained model, and no client may
leave traces in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def saved_buffers(net: Any) -> dict[str, torch.Tensor]:
    """Name -> buffer that belongs into a file of the model: running means and variances and their like; empty
    for most transformers."""
    found = {}
    for path, module in net.named_modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def freeze_statistics(net: Any) -> None:
    """Put every layer with statistics of its own (batch and instance norms, spectral norms) into eval mode,
    its children aside.

    Such layers then normalise with the pretrained statistics, so that a batch of one works and one state has
    one score; gains and offsets
    still learn where they are trained.
    """
    for module in net.modules():
        if (
            getattr(module, "track_running_stats", False)
            or "running_mean" in module._buffers
            or "_u" in module._buffers
        ):
            module.training = False


@contextmanager
def unchanged(net: Any) -> Iterator[None]:
    """Whatever else writes into a saved buffer while training is undone afterwards: the network is shared by
    clients, and no state holds buffers."""
    before = {name: value.clone() for name, value in saved_buffers(net).items()}
    try:
        yield
    finally:
        after = saved_buffers(net)
        for name, value in before.items():
            if name in after and not torch.equal(after[name], value):
                after[name].copy_(value)
