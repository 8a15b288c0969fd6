"""Changes to what clients hold."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import Refused
from fedtune.schema import Schema
from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState
from fedtune.transforms.sparsify import ternary_bits, ternary_levels
from fedtune.types import Tensors, Update
from fedtune.wire.scales import expand


class Delta(DownlinkCode):
    """step = "delta": to clients that hold the broadcast before, the signs of the largest changes; to all
    others, everything.

    The server keeps a copy of what an up-to-date client holds. The next message is made from the difference
    between the state and
    that copy, so what one message left out is in the next: that is error feedback, without a residual of its
    own.
    """

    step: Literal["delta"] = "delta"
    remembers: ClassVar[bool] = True
    keep: float = Field(0.2, gt=0, le=1)
    """Share of all numbers whose change is sent."""

    def pack(self, state: Tensors, before: HeldState | None, round: int) -> Broadcast:
        """A broadcast of another schema makes no delta: everybody gets everything."""
        if before is None or Schema.of(before.tensors) != Schema.of(state):
            full = Update.of(state)
            return Broadcast(full, None, 0, HeldState(round, full.values()))
        moved = {name: np.asarray(value, np.float64) - before.tensors[name] for name, value in state.items()}
        levels, scales = ternary_levels(moved, self.keep)
        delta = Update(levels, 1.0, {}, scales)
        held = HeldState(round, self.unpack(delta, before.tensors))
        return Broadcast(Update.of(held.tensors), delta, before.round, held)

    def unpack(self, message: Update, before: Tensors | None) -> dict[str, np.ndarray]:
        if not message.scales:
            return message.values()
        if before is None or Schema.of(before) != Schema.of(message.tensors):
            raise Refused(
                "W604",
                "changes relative to a broadcast that is not stored here",
                "the whole state",
                "ask for the whole state",
            )
        moves = {
            name: expand(level, message.scales[name]) + before[name]
            for name, level in message.tensors.items()
        }
        return {name: np.asarray(move, np.float32) for name, move in moves.items()}

    def bits(self, schema: Schema) -> tuple[float, float]:
        scales = 16 * len(schema.entries) / max(schema.count, 1)
        return 32.0, 1.008 * ternary_bits(self.keep) + scales
