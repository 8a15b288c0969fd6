"""Changes to what clients hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import Refused
from fedtune.rng import stream
from fedtune.schema import Schema
from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState
from fedtune.transforms.downlink.int8 import Int8
from fedtune.transforms.downlink.plain import Plain
from fedtune.transforms.levels import Coded, Values
from fedtune.transforms.quantize import BLOCK_BITS, block_levels, sign_levels
from fedtune.transforms.sparsify import ternary_bits, ternary_levels, two_bit_levels
from fedtune.types import Tensors, Update
from fedtune.wire.scales import BLOCK, expand


class Delta(DownlinkCode):
    """step = "delta": to clients that hold the broadcast before, what changed, in few bits; to all others,
    everything.

    The server keeps a copy of what an up-to-date client holds. The next message is made from the difference
    between the state and
    that copy, so what one message left out is in the next: that is error feedback, without a residual of its
    own.
    """

    step: Literal["delta"] = "delta"
    remembers: ClassVar[bool] = True
    keep: float = Field(0.2, gt=0, le=1)
    """Share of all numbers whose change is sent, the largest; 1: all of them."""
    chunk: int = Field(0, ge=0)
    """keep below 1: one threshold for each so many numbers; 0: one for all tensors."""
    width: Literal[1, 2, 4, 8] = 1
    """Bits of a change that is sent: its sign; 2: also whether it is a large one; with keep = 1, levels by
    blocks of 64 from 2 bits on."""
    start: Literal["float32", "int8"] = "float32"
    """How the first broadcast travels; int8: by blocks of 64, a quarter of the bytes."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        if self.width > 2 and self.keep < 1:
            found = f"downlink.width = {self.width} with downlink.keep = {self.keep}"
            yield found, "keep = 1 for more than two bits", "set downlink.keep = 1, or downlink.width = 2"

    def pack(self, state: Tensors, before: HeldState | None, round: int) -> Broadcast:
        """A broadcast of another schema makes no delta: everybody gets everything."""
        if before is None or Schema.of(before.tensors) != Schema.of(state):
            return (Int8() if self.start == "int8" else Plain()).pack(state, None, round)
        moved = {name: np.asarray(value, np.float64) - before.tensors[name] for name, value in state.items()}
        levels, scales = self.code(moved)
        delta = Update(levels, 1.0, {}, scales)
        held = HeldState(round, self.unpack(delta, before.tensors))
        return Broadcast(Update.of(held.tensors), delta, before.round, held)

    def code(self, moved: Values) -> Coded:
        """Levels and scales of a change."""
        if self.keep < 1:
            few = ternary_levels if self.width == 1 else two_bit_levels
            return few(moved, self.keep, chunk=self.chunk)
        if self.width == 1:
            return sign_levels(moved)
        return block_levels(moved, stream("broadcast"), 2 ** (self.width - 1) - 1, random=False)

    def unpack(self, message: Update, before: Tensors | None) -> dict[str, np.ndarray]:
        if not message.scales:
            return message.values()
        if before is None and self.start == "int8":
            return Int8().unpack(message, None)
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
        full = 32.0 if self.start == "float32" else Int8().bits(schema)[0]
        if self.keep == 1 and self.width > 1:
            return full, BLOCK_BITS[self.width] + 16 / BLOCK
        scales = 16 * len(schema.entries) / max(schema.count, 1)
        return full, 1.008 * ternary_bits(self.keep) + (self.width - 1) * self.keep + scales
