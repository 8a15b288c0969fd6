"""Skewed labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.data.partition.base import KeyedPartition
from fedtune.rng import seed_of


class Dirichlet(KeyedPartition):
    """by = "dirichlet": for each label, shares drawn from Dirichlet(alpha) (Hsu et al. 2019,
    arXiv:1909.06335)."""

    by: Literal["dirichlet"] = "dirichlet"
    help_: ClassVar[str] = "raise partition.alpha, lower partition.clients, or choose another seed"
    alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet distribution: small is skewed."""

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        """Drawn once: a client without rows is told, not redrawn. As flwr-datasets' DirichletPartitioner
        divides them, whose import takes two seconds."""
        rng, labels = np.random.default_rng(seed_of("partition", seed)), np.asarray(keys)
        clients: list[list[int]] = [[] for _ in range(self.clients)]
        for label in sorted(set(keys)):
            rows = np.nonzero(labels == label)[0]
            ends = (np.cumsum(rng.dirichlet(np.full(self.clients, self.alpha))) * len(rows)).astype(int)
            for client, part in zip(clients, np.split(rows, ends[:-1]), strict=True):
                client.extend(part.tolist())
        return clients
