"""Equal shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedtune.data.partition.base import Partition, load_partitions
from fedtune.rng import stream


class Iid(Partition):
    """by = "iid": equal shares (to one row) of the shuffled rows."""

    by: Literal["iid"] = "iid"

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        from flwr_datasets.partitioner import IidPartitioner

        return load_partitions(
            IidPartitioner(self.clients), stream("partition", seed).permutation(len(keys)), self.clients
        )
