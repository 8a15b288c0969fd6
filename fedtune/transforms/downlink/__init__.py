"""Codes of the way down, one file each. A code is registered by its place in `DownlinkSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from fedtune.plugins import extended
from fedtune.settings import classes_by_tag
from fedtune.transforms.downlink.base import Broadcast, DownlinkCode, HeldState, hold, holding
from fedtune.transforms.downlink.delta import Delta
from fedtune.transforms.downlink.int8 import Int8
from fedtune.transforms.downlink.plain import Plain

DownlinkSettings = Annotated[Plain | Int8 | Delta, Field(discriminator="step")]
if not TYPE_CHECKING:
    DownlinkSettings = extended(DownlinkSettings, "step", "downlinks", DownlinkCode)
DOWNLINKS: dict[str, type[DownlinkCode]] = classes_by_tag(DownlinkSettings, "step")


def downlink_of(step: str = "none", **options: Any) -> DownlinkCode:
    """The code of that name with these options, as a recipe's [downlink] would give it. Raises pydantic's
    ValidationError."""
    settings: DownlinkCode = TypeAdapter(DownlinkSettings).validate_python({"step": step, **options})
    return settings


__all__ = [
    "DOWNLINKS",
    "Broadcast",
    "DownlinkCode",
    "DownlinkSettings",
    "HeldState",
    "Plain",
    "downlink_of",
    "hold",
    "holding",
]
