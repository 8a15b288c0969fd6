"""Few labels a client. flwr-datasets' own partitioner loses up to one row a shard, so the few lines are
here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from fedtune.data.partition.base import KeyedPartition
from fedtune.rng import stream


class Shards(KeyedPartition):
    """by = "shards": rows sorted by label and cut into equal shards (to one row), dealt at random (McMahan et
    al. 2017, arXiv:1602.05629)."""

    by: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)
    """Shards that each client receives."""

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        ordered = sorted(range(len(keys)), key=lambda row: keys[row])
        pieces = np.array_split(np.asarray(ordered), self.clients * self.shards_per_client)
        hands = (
            stream("partition", seed).permutation(len(pieces)).reshape(self.clients, self.shards_per_client)
        )
        return [[int(row) for piece in hand for row in pieces[piece]] for hand in hands]
