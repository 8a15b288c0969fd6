"""The way down for states of whole numbers: a client that holds an earlier broadcast gets what changed since,
exactly, and a late joiner what is not 0.

The server keeps, for each number, the last broadcast and the round in which it last changed: enough for a
client that was away for any number of rounds.
"""

from __future__ import annotations

import numpy as np

from fedtune.transforms.downlink import HeldState
from fedtune.types import Tensors

ROUNDS = "rounds/"  # + name: the round in which each number of a tensor last changed


def recorded(before: HeldState | None, state: Tensors, round: int) -> HeldState:
    """The server's record after a broadcast of `state`. A tensor that is new was 0 wherever a client does not
    hold it."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in state.items():
        known = before is not None and name in before.tensors and before.tensors[name].shape == value.shape
        last = before.tensors[name] if before and known else np.zeros_like(value)
        rounds = before.tensors[ROUNDS + name] if before and known else np.zeros(value.shape, np.int32)
        changed = (value != last) | (
            before is None
        )  # what clients held before there was a record is not known
        tensors |= {name: value, ROUNDS + name: np.where(changed, np.int32(round), rounds)}
    return HeldState(round, tensors)


def changed_since(record: HeldState, round: int) -> dict[str, np.ndarray]:
    """Which numbers of the last broadcast a client that holds that of `round` does not hold."""
    return {
        name: record.tensors[ROUNDS + name] > round for name in record.tensors if not name.startswith(ROUNDS)
    }


def not_zero(state: Tensors) -> dict[str, np.ndarray]:
    """Which numbers a client that holds nothing must be told."""
    return {name: value != 0 for name, value in state.items()}
