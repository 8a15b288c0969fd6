"""Skewed sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedtune.data.partition.base import Partition
from fedtune.rng import stream


class Size(Partition):
    """by = "size": the shuffled rows in shares of 1 : 2 : ... : clients, so that the last client has most; as
    flwr-datasets' LinearPartitioner divides them."""

    by: Literal["size"] = "size"

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        order = stream("partition", seed).permutation(len(keys))
        units = np.linspace(1, self.clients, self.clients)
        sizes = (units / units.sum() * len(keys)).astype(np.int64)  # what rounding leaves is the last one's
        if not sizes[0]:
            raise self.too_few("client-0", 0)
        return [part.tolist() for part in np.split(order, np.cumsum(sizes[:-1]))]
