"""Equal shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedtune.data.partition.base import Partition
from fedtune.rng import stream


class Iid(Partition):
    """by = "iid": equal shares (to one row) of the shuffled rows, as flwr-datasets' IidPartitioner divides
    them."""

    by: Literal["iid"] = "iid"

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        order = stream("partition", seed).permutation(len(keys))
        return [part.tolist() for part in np.array_split(order, self.clients)]
