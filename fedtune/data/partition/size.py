"""Skewed sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedtune.data.partition.base import Partition, load_partitions
from fedtune.rng import stream


class Size(Partition):
    """by = "size": the shuffled rows in shares of 1 : 2 : ... : clients, so that the last client has most."""

    by: Literal["size"] = "size"

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        from flwr_datasets.partitioner import LinearPartitioner

        try:
            return load_partitions(
                LinearPartitioner(self.clients),
                stream("partition", seed).permutation(len(keys)),
                self.clients,
            )
        except ValueError:  # the first client's share of so few rows is none
            raise self.too_few("client-0", 0) from None
