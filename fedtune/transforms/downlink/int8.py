"""Eight bits a number."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedtune.rng import stream
from fedtune.schema import Schema
from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState
from fedtune.transforms.quantize import block_levels
from fedtune.types import Tensors, Update
from fedtune.wire.scales import BLOCK, expand

TOP = 127  # levels of a block reach from -127 to 127


class Int8(DownlinkCode):
    """step = "int8": the state by blocks of 64 numbers: a quarter of the bytes, nothing is kept."""

    step: Literal["int8"] = "int8"

    def pack(self, state: Tensors, before: HeldState | None, round: int) -> Broadcast:
        values = {name: np.asarray(value, np.float64) for name, value in state.items()}
        levels, scales = block_levels(values, stream("broadcast"), TOP, random=False)
        full = Update(levels, 1.0, {}, scales)
        return Broadcast(full, None, 0, HeldState(round, self.unpack(full, None)))

    def unpack(self, message: Update, before: Tensors | None) -> dict[str, np.ndarray]:
        if not message.scales:
            return message.values()
        return {
            name: np.asarray(expand(level, message.scales[name]), np.float32)
            for name, level in message.tensors.items()
        }

    def bits(self, schema: Schema) -> tuple[float, float]:
        return 8 + 16 / BLOCK, 8 + 16 / BLOCK
