"""A model that is only asked for its loss: no gradients, nothing kept between layers, the memory of
inference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedtune.errors import FedtuneError
from fedtune.model.device_memory import losses_in_parts
from fedtune.model.encode import Encoded
from fedtune.model.loss import autocast, carries, check_room, summed_loss, without_idle_mask
from fedtune.model.training_loss import Loss
from fedtune.model.tunable import TunableModel


@contextmanager
def forward_only(tunable: TunableModel, encoded: Encoded) -> Iterator[None]:
    """Eval mode without gradients: two losses of one batch differ by the weights alone. Raises D205 without
    examples."""
    tunable.check_live()
    if not len(encoded):
        raise FedtuneError(
            "D205", "a client without training examples", "at least one", "give it rows or leave it out"
        )
    check_room(tunable, encoded)
    tunable.net.eval()
    with torch.inference_mode():
        yield


def batch_of(tunable: TunableModel, encoded: Encoded, indices: list[int]) -> dict[str, torch.Tensor]:
    """A batch on the tunable model's device."""
    batch = without_idle_mask(tunable, encoded.collate(indices))
    return {name: value.to(tunable.base.device) for name, value in batch.items()}


def mean_loss(tunable: TunableModel, batch: dict[str, torch.Tensor], loss_of: Loss | None = None) -> float:
    """Cross entropy in nats, or what else is trained by, a token or an example."""

    def loss(start: int, stop: int) -> float:
        part = {name: value[start:stop] for name, value in batch.items()}
        with autocast(tunable, "auto"):
            total = loss_of(tunable, part) if loss_of else summed_loss(tunable, part)[0]
            return float(total.item())

    count = len(batch["labels"])
    total = sum(losses_in_parts(tunable.base, count, count, loss))
    return total / carries(tunable.base.task, batch)


def room_for(tunable: TunableModel) -> int:
    """Bytes that a training may take of the device that the tunable model is on, this model among them: half
    of the GPU's or the machine's memory, of a GPU no more than others have left of it."""
    device = tunable.base.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(min(total // 2, free + torch.cuda.memory_reserved(device)))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
