"""The trained tensors as they were before any training: what a model is rebuilt from, to the bit, on every
machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedtune.model.adapters.wrap import plain
from fedtune.model.known_digests import WORTH, known_or
from fedtune.model.tunable import TunableModel
from fedtune.rng import stream

STEPS = 2**15  # levels of a fresh value on either side of zero


@dataclass(frozen=True)
class Origin:
    """First values by name (sorted), on the tunable model's device.

    Where the base has a parameter, this is the base's own, in its own type and not a copy; what was drawn is
    held here as float32.
    """

    tensors: dict[str, torch.Tensor]
    digest: bytes  # SHA-256 over names, shapes and float32 values
    seed: int  # the run's


def keep_origin(tunable: TunableModel, seed: int) -> None:
    """Note the tunable model's first values, and draw what the pretrained file lacks anew.

    transformers draws a fresh head with torch's generator, whose bits differ between instruction sets and
    releases. Whoever rebuilds a model
    from a seed file needs the same head, so its matrices are whole numbers of numpy's PCG64 times one factor:
    uniform, with the variance that the
    model's configuration asks for. Vectors stay: they start as zeros or ones.
    """
    base = tunable.base
    reach = np.float32(3**0.5 * (getattr(base.net.config, "initializer_range", None) or 0.02) / STEPS)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in tunable.named.items():
        own = plain(name)
        if own in base.fresh and value.ndim > 1:
            whole = (
                stream("fresh " + own, seed)
                .integers(-STEPS, STEPS, tuple(value.shape), endpoint=True)
                .astype(np.float32)
            )
            tensors[name] = torch.from_numpy(whole * reach).to(value.device)
        else:
            first = base.weights.get(own)
            same = (
                first is not None
                and first.shape == value.shape
                and bool(torch.equal(first.detach().to(value.dtype), value.detach()))
            )
            tensors[name] = first.detach() if first is not None and same else value.detach().clone()
    tunable.origin = Origin(tensors, origin_digest(tunable, tensors), seed)
    reset(tunable)


def set_first(tunable: TunableModel, name: str, values: np.ndarray) -> None:
    """Other first values for one tensor; the digest stays that of what was drawn."""
    tunable.origin.tensors[name] = torch.from_numpy(np.array(values, np.float32, order="C")).to(
        tunable.base.device
    )


def reset(tunable: TunableModel) -> None:
    """Put the first values back."""
    with torch.no_grad():
        for name, value in tunable.named.items():
            value.copy_(tunable.origin.tensors[name])


def put_update(tunable: TunableModel, again: Callable[[Mapping[str, Any]], None]) -> None:
    """First minus last values (w moves against the scalars) in the place of the last. The first ones are made
    once more, a tensor at a time: a copy of all would be 4 bytes a parameter beside the model."""
    with torch.no_grad():
        for name, value in tunable.named.items():
            first = torch.empty_like(value)
            again({name: first})
            value.copy_(first.sub_(value))


def origin_digest(tunable: TunableModel, tensors: dict[str, torch.Tensor]) -> bytes:
    """As `digest_of`; of a large model as it was found earlier for the same base."""
    base = tunable.base
    own = {value.data_ptr(): name for name, value in base.weights.items()}
    size = sum(4 * value.numel() for value in tensors.values() if value.data_ptr() in own)

    def compute() -> str:
        return digest_of(tensors).hex()

    if size < WORTH:
        return bytes.fromhex(compute())
    follows = [
        [name, list(value.shape), own.get(value.data_ptr()) or digest_of({name: value}).hex()]
        for name, value in tensors.items()
    ]
    return bytes.fromhex(known_or([base.held_fingerprint, follows], size, compute))


def digest_of(tensors: dict[str, torch.Tensor]) -> bytes:
    """SHA-256 over names, shapes and float32 values, a tensor at a time."""
    total = hashlib.sha256()
    for name, value in tensors.items():
        total.update(json.dumps([name, list(value.shape)]).encode())
        total.update(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return total.digest()
