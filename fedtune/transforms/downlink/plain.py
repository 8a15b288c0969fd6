"""The state as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState
from fedtune.types import Tensors, Update


class Plain(DownlinkCode):
    """step = "none": the state, float32."""

    step: Literal["none"] = "none"
    lossy: ClassVar[bool] = False

    def pack(self, state: Tensors, before: HeldState | None, round: int) -> Broadcast:
        full = Update.of(state)
        return Broadcast(full, None, 0, HeldState(round, full.values()))
