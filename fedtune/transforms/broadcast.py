"""The way down: what the server sends to its clients, and what they then hold, which both sides compute to the same bits.

    none    the state, float32
    int8    the state by blocks of 64 numbers: a quarter of the bytes, no memory on either side
    delta   to clients that hold the broadcast before: the signs of the largest changes; to all others: everything

Under `delta` the server keeps a copy of what an up-to-date client holds. The next message is made from the difference between
the state and that copy, so what one message left out is in the next: that is error feedback, without a residual of its own.

Clients of a lossy way down do not hold the server's state, so their answers must be differences (a chain with a step): the
server adds them to its own state, and nothing that the way down left out is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from fedtune.errors import Refused
from fedtune.rng import stream
from fedtune.schema import Schema
from fedtune.settings import Settings
from fedtune.transforms.quantize import block_levels
from fedtune.transforms.sparsify import ternary_bits, ternary_levels
from fedtune.types import Tensors, Update
from fedtune.wire.scales import BLOCK, expand

TOP = 127  # levels of a block reach from -127 to 127


class DownlinkSettings(Settings):
    """[downlink]: how the state travels to the clients."""

    step: Literal["none", "int8", "delta"] = "none"
    """none: float32; int8: blocks of 64; delta: changes for clients that hold the broadcast before, everything for others."""
    keep: float = Field(0.2, gt=0, le=1)
    """delta: share of all numbers whose change is sent."""


@dataclass(frozen=True)
class Held:
    """What a client that took the broadcast of `round` holds: float32, or whole numbers (exact.py). The server keeps it from round to round."""

    round: int
    tensors: Tensors


@dataclass(frozen=True)
class Broadcast:
    """One round's messages.

    full   for everybody: float32 values or int8 levels
    delta  for clients that hold the broadcast of round `since`; None where there is none
    held   what every client holds after either of them
    """

    full: Update
    delta: Update | None
    since: int
    held: Held


def pack(settings: DownlinkSettings, state: Tensors, before: Held | None, round: int) -> Broadcast:
    """This round's messages for a state (float32). `before` is the `held` of an earlier round, None before the first.

    A broadcast of another schema makes no delta: everybody gets everything.
    """
    values = {name: np.asarray(value, np.float64) for name, value in state.items()}
    if settings.step == "int8":
        levels, scales = block_levels(values, stream("broadcast"), TOP, random=False)
        full = Update(levels, 1.0, {}, scales)
        return Broadcast(full, None, 0, Held(round, unpack(settings, full, None)))
    if settings.step == "none" or before is None or Schema.of(before.tensors) != Schema.of(state):
        full = Update.of(state)
        return Broadcast(full, None, 0, Held(round, full.values()))
    levels, scales = ternary_levels({name: value - before.tensors[name] for name, value in values.items()}, settings.keep)
    delta = Update(levels, 1.0, {}, scales)
    held = Held(round, unpack(settings, delta, before.tensors))
    return Broadcast(Update.of(held.tensors), delta, before.round, held)


def unpack(settings: DownlinkSettings, message: Update, before: Tensors | None) -> dict[str, np.ndarray]:
    """What the receiver of a message holds now, float32. Raises Refused W604 for a delta to something that it does not hold."""
    if not message.scales:
        return message.values()
    moves = {name: expand(level, message.scales[name]) for name, level in message.tensors.items()}
    if settings.step == "delta":
        if before is None or Schema.of(before) != Schema.of(message.tensors):
            raise Refused("W604", "a change to a broadcast that is not held here", "the whole state", "ask for everything")
        moves = {name: move + before[name] for name, move in moves.items()}
    return {name: np.asarray(move, np.float32) for name, move in moves.items()}


def down_bits(settings: DownlinkSettings, schema: Schema) -> tuple[float, float]:
    """Estimated bits a parameter of the full message and of the one to up-to-date clients."""
    scales = 16 * len(schema.entries) / max(schema.count, 1)
    if settings.step == "int8":
        return 8 + 16 / BLOCK, 8 + 16 / BLOCK
    return 32.0, 1.008 * ternary_bits(settings.keep) + scales if settings.step == "delta" else 32.0


# --- a client's memory of it ------------------------------------------------------------------------------------------


def hold(memory: dict[str, np.ndarray], held: Held) -> None:
    """Keep a broadcast in a client's memory, in place of the one before."""
    for key in [key for key in memory if key.startswith("held/")]:
        del memory[key]
    memory.update({f"held/{name}": np.asarray(value) for name, value in held.tensors.items()})
    memory["held.round"] = np.asarray(held.round, np.int64)


def holding(memory: dict[str, np.ndarray]) -> Held | None:
    """The broadcast that a client's memory holds."""
    if "held.round" not in memory:
        return None
    return Held(int(memory["held.round"]), {key.removeprefix("held/"): value for key, value in memory.items() if key.startswith("held/")})
