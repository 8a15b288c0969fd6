"""Eight bits where answers travel in few bits, too, and where they were measured to cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState
from fedtune.transforms.downlink.int8 import Int8
from fedtune.transforms.downlink.plain import Plain
from fedtune.types import Tensors


class Auto(DownlinkCode):
    """step = "auto": int8 where the chain packs answers and the state is LoRA factors, which lose nothing by
    it that shows; none otherwise. A run's config.json says which of them it was."""

    step: Literal["auto"] = "auto"
    lossy: ClassVar[bool] = False

    def choices(self, recipe: Any) -> Iterator[DownlinkCode]:
        if recipe.method.rounds_well(recipe.aggregate) and any(
            step.build().gives == "packed" for step in recipe.chain
        ):
            yield Int8()
        yield Plain()

    def pack(self, state: Tensors, before: HeldState | None, round: int) -> Broadcast:
        return Plain().pack(state, before, round)
