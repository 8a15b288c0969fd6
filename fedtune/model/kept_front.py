"""Training that begins behind the frozen blocks: what they say of a client's rows is computed once
(method.adapter.keep_front).

The blocks run in eval mode and on the same batches in every process, a client's rows by length, so a run has
the same bytes on every engine and after a crash. Their dropout is gone: each step of ordinary training draws
masks anew, of which nothing could be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fedtune import progress
from fedtune.errors import FedtuneError
from fedtune.hf.config import width_of
from fedtune.hf.probe import smallest
from fedtune.model.adapters import Adapter
from fedtune.model.base import Base
from fedtune.model.encode import Encoded
from fedtune.model.forward import forward_only
from fedtune.model.frozen_front import frozen_blocks, said_by, skipped, weights_of
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.training_loss import Loss
from fedtune.model.tunable import TunableModel, attach

FRONT = "front"  # of a batch: (examples, tokens, width) in front of the first block that is trained
BATCH = 32  # rows in a forward pass
CLOSE = 1e-4  # of the largest logit: the order of sums differs


def reserve(tunable: TunableModel, encoded: Encoded) -> None:
    """Memory for a client's rows, before the process forks."""
    encoded.front.reserve(lengths_of(encoded), width_of(tunable.base.net.config))


def behind_front(tunable: TunableModel, encoded: Encoded) -> Encoded:
    """The same examples, whose batches bring what the front says of them; as they are where nothing is to be
    kept."""
    if not tunable.keeps_front:
        return encoded
    rows, side = rows_of(tunable, encoded), tunable.base.pad_side

    def collate(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        padded = pad_sequence([rows[number] for number in indices], batch_first=True, padding_side=side)
        return encoded.collate(indices) | {FRONT: padded}

    return replace(encoded, collate=collate)


@contextmanager
def from_front(tunable: TunableModel, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The batch without what `behind_front` has added, which forward passes meanwhile begin with."""
    rest = {name: value for name, value in batch.items() if name != FRONT}
    if FRONT not in batch:
        yield rest
        return
    blocks, first = frozen_blocks(tunable)
    dtype = next(iter(tunable.base.weights.values())).dtype
    with skipped(blocks[:first], batch[FRONT].to(tunable.base.device, dtype)):
        yield rest


def loss_from_front(loss_of: Loss) -> Loss:
    """The loss of batches that may bring what the front says."""

    def loss(tunable: TunableModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with from_front(tunable, batch) as rest:
            return loss_of(tunable, rest)

    return loss


def rows_of(tunable: TunableModel, encoded: Encoded) -> list[torch.Tensor]:
    """(tokens, width) of every example, computed where this is the first to ask; of rows in one place, what
    each part has."""
    if encoded.parts:
        return [row for part in encoded.parts for row in rows_of(tunable, part)]
    blocks, first = front_of(tunable)
    key = hash(weights_of(tunable, blocks[:first])) or 1
    if not encoded.front.known(key):
        reserve(tunable, encoded)
        fill(tunable, encoded, blocks, first)
        encoded.front.done(key)
    return encoded.front.rows


def fill(tunable: TunableModel, encoded: Encoded, blocks: list[Any], first: int) -> None:
    order, rows = encoded.by_length(), encoded.front.rows
    with forward_only(tunable, encoded), autocast(tunable, "off"):
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            batch = encoded.collate(some)
            with skipped(blocks[first:]), said_by(blocks[first - 1]) as heard:
                tunable.net(**inputs_of(tunable, batch)[0])
            for number, said, shown in zip(
                some, heard[0].float().cpu(), batch["attention_mask"], strict=True
            ):
                rows[number].copy_(said[shown.bool()])
            progress.say("reading rows", start + len(some), len(order))


def front_of(tunable: TunableModel) -> tuple[list[Any], int]:
    """The blocks, and how many of them stand in front. Raises M306 where none does."""
    blocks, first = frozen_blocks(tunable)
    if not first:
        raise unfit(tunable, "nothing that can be kept in front of the adapter")
    return blocks, first


def attach_tried(base: Base, adapter: Adapter, seed: int) -> TunableModel:
    """`attach`, after which a front that is to be kept has been tried. Raises M306."""
    tunable = attach(base, adapter, seed)
    try_front(tunable)
    return tunable


def try_front(tunable: TunableModel) -> None:
    """A model in which more goes from block to block than one hidden state shows here. Raises M306."""
    if not tunable.keeps_front or tunable.base.device.type == "meta":
        return
    blocks, first = front_of(tunable)
    inputs = smallest(tunable.base.net, tunable.base)
    with torch.no_grad(), autocast(tunable, "off"):
        with said_by(blocks[first - 1]) as heard:
            whole = tunable.net(**inputs).logits.float()
        if len(heard) != 1 or not isinstance(heard[0], torch.Tensor):
            raise unfit(tunable, "blocks that say more than one hidden state")
        with skipped(blocks[:first], heard[0]):
            behind = tunable.net(**inputs).logits.float()
    if (whole - behind).abs().max() > CLOSE * whole.abs().max():
        raise unfit(tunable, "later blocks that read more than the hidden state of the one before")


def unfit(tunable: TunableModel, why: str) -> FedtuneError:
    return FedtuneError(
        "M306",
        f"method.adapter.keep_front with a {type(tunable.base.net).__name__}: {why}",
        "a stack of blocks of which the adapter leaves the first ones alone",
        "set method.adapter.keep_front = false",
    )


def lengths_of(encoded: Encoded) -> list[int]:
    return [encoded.length(number) for number in range(len(encoded))]
