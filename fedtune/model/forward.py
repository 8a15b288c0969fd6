"""A model that is only asked for its loss: no gradients, nothing kept between layers, the memory of inference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedtune.errors import FedtuneError
from fedtune.model.bench import Bench
from fedtune.model.encode import Encoded
from fedtune.model.loss import autocast, carries, check_room, summed_loss


@contextmanager
def forward_only(bench: Bench, encoded: Encoded) -> Iterator[None]:
    """Eval mode without gradients: two losses of one batch differ by the weights alone. Raises D205 without examples."""
    bench.check_live()
    if not len(encoded):
        raise FedtuneError("D205", "a client without training examples", "at least one", "give it rows or leave it out")
    check_room(bench, encoded)
    bench.net.eval()
    with torch.inference_mode():
        yield


def batch_of(bench: Bench, encoded: Encoded, indices: list[int]) -> dict[str, torch.Tensor]:
    """A batch on the bench's device."""
    return {name: value.to(bench.base.device) for name, value in encoded.collate(indices).items()}


def mean_loss(bench: Bench, batch: dict[str, torch.Tensor]) -> float:
    """Cross entropy in nats, a token or an example."""
    with autocast(bench, "auto"):
        total = summed_loss(bench, batch)[0]
    return float(total.item()) / carries(bench.base.task, batch)


def device_bytes(bench: Bench) -> int:
    """Memory of the device that the bench is on: of the GPU, or of the machine."""
    if bench.base.device.type == "cuda":
        return int(torch.cuda.get_device_properties(bench.base.device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
