"""Skewed labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.data.partition.base import KeyedPartition, load_partitions
from fedtune.rng import seed_of


class Dirichlet(KeyedPartition):
    """by = "dirichlet": for each label, shares drawn from Dirichlet(alpha) (Hsu et al. 2019,
    arXiv:1909.06335)."""

    by: Literal["dirichlet"] = "dirichlet"
    help_: ClassVar[str] = "raise partition.alpha, lower partition.clients, or choose another seed"
    alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet distribution: small is skewed."""

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        """Drawn once: a client without rows is told, not redrawn."""
        from flwr_datasets.partitioner import DirichletPartitioner

        drawn = {
            "min_partition_size": 0,
            "self_balancing": False,
            "shuffle": False,
            "seed": seed_of("partition", seed),
        }
        return load_partitions(
            DirichletPartitioner(self.clients, "key", self.alpha, **drawn),
            np.arange(len(keys)),
            self.clients,
            keys,
        )
