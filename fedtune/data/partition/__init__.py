"""Partitions, one file each: settings and code. A partition is registered by its place in
`PartitionSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.data.partition.base import Partition
from fedtune.data.partition.column import Column
from fedtune.data.partition.dirichlet import Dirichlet
from fedtune.data.partition.iid import Iid
from fedtune.data.partition.shards import Shards
from fedtune.data.partition.size import Size
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

PartitionSettings = Annotated[Iid | Dirichlet | Column | Shards | Size, Field(discriminator="by")]
if not TYPE_CHECKING:
    PartitionSettings = extended(PartitionSettings, "by", "partitions", Partition)
PARTITIONS: dict[str, type[Partition]] = classes_by_tag(PartitionSettings, "by")


__all__ = ["PARTITIONS", "Dirichlet", "Partition", "PartitionSettings"]
