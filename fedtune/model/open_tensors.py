"""The tensors that a network of somebody else's trains, as arrays, whoever opened them for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedtune.errors import FedtuneError


def read_open(net: Any) -> dict[str, np.ndarray]:
    """Float32 copies of the parameters that need gradients, by name. Raises M305 where there are none."""
    found = {
        name: value.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, value in net.named_parameters()
        if value.requires_grad
    }
    if not found:
        raise FedtuneError(
            "M305",
            "a model without parameters that need gradients",
            "some to train",
            "open some for training",
        )
    return found


def write_open(net: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy values into the parameters of these names, in place."""
    write_into(dict(net.named_parameters()), tensors)


def write_into(named: Mapping[str, torch.Tensor], tensors: Mapping[str, np.ndarray]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            named[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
