"""The server's optimiser: torch's own, on the pseudo-gradient (state - mean of answers), with its moments
carried as arrays."""

from __future__ import annotations

import numpy as np
import torch

from fedtune.model.server_optimizers import ServerOptimizer
from fedtune.types import Tensors


def outer_step(
    shared: Tensors, mean: Tensors, kept: Tensors, settings: ServerOptimizer
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One step from `shared` against the gradient shared - mean -> (new shared, new kept).

    `kept` holds torch's state as "<entry>/<tensor>", e.g. "momentum_buffer/classifier.weight"; empty before
    the first step. On the CPU,
    tensor by tensor: the result equals an optimiser that never stopped, bit for bit.
    """
    if settings.optimizer == "none":
        return dict(mean), dict(kept)
    names = sorted(shared)
    values = [torch.nn.Parameter(torch.from_numpy(np.array(shared[name], np.float32))) for name in names]
    optimizer = settings.make(values)
    for name, value in zip(names, values, strict=True):
        value.grad = torch.from_numpy(
            np.asarray(shared[name], np.float32) - np.asarray(mean[name], np.float32)
        )
        state = {
            key.partition("/")[0]: torch.from_numpy(np.array(array))
            for key, array in kept.items()
            if key.partition("/")[2] == name
        }
        if state:
            optimizer.state[value] = state
    optimizer.step()
    after = {
        f"{entry}/{name}": np.array(moment.detach().numpy())
        for name, value in zip(names, values, strict=True)
        for entry, moment in optimizer.state[value].items()
        if isinstance(moment, torch.Tensor)
    }
    return {name: value.detach().numpy() for name, value in zip(names, values, strict=True)}, after
