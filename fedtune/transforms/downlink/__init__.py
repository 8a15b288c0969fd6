"""Codes of the way down, one file each. A code is registered by its place in `DownlinkSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.plugins import extended
from fedtune.settings import classes_by_tag
from fedtune.transforms.downlink.auto import Auto
from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState, hold, holding
from fedtune.transforms.downlink.delta import Delta
from fedtune.transforms.downlink.int8 import Int8
from fedtune.transforms.downlink.plain import Plain

DownlinkSettings = Annotated[Auto | Plain | Int8 | Delta, Field(discriminator="step")]
if not TYPE_CHECKING:
    DownlinkSettings = extended(DownlinkSettings, "step", "downlinks", DownlinkCode)
DOWNLINKS: dict[str, type[DownlinkCode]] = classes_by_tag(DownlinkSettings, "step")


__all__ = [
    "DOWNLINKS",
    "Auto",
    "Broadcast",
    "DownlinkCode",
    "DownlinkSettings",
    "HeldState",
    "Plain",
    "hold",
    "holding",
]
