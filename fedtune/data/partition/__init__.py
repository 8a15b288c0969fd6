"""Partitions, one file each: settings and code. A partition is registered by its place in
`PartitionSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

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


def partition_of(by: str = "dirichlet", **options: Any) -> Partition:
    """The partition of that name with these options, as a recipe's [partition] would give it. Raises
    pydantic's ValidationError."""
    settings: Partition = TypeAdapter(PartitionSettings).validate_python({"by": by, **options})
    return settings


__all__ = ["PARTITIONS", "Dirichlet", "Partition", "PartitionSettings", "partition_of"]
