"""Tables of a recipe by name, as parsing would give them; options that the class does not have raise pydantic's ValidationError."""

from __future__ import annotations

from typing import Any

from fedtune.data.partition import PARTITIONS, Partition
from fedtune.data.sources import SOURCES, Source
from fedtune.model.adapters import ADAPTERS, Adapter
from fedtune.transforms.downlink import DOWNLINKS, DownlinkCode


def adapter_of(kind: str = "lora", **options: Any) -> Adapter:
    return ADAPTERS[kind](**options)


def downlink_of(step: str = "none", **options: Any) -> DownlinkCode:
    return DOWNLINKS[step](**options)


def partition_of(by: str = "dirichlet", **options: Any) -> Partition:
    return PARTITIONS[by](**options)


def data_of(source: str = "docstrings", **options: Any) -> Source:
    return SOURCES[source](**options)
