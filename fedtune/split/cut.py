"""Where a model is cut, and what goes with a hidden state through the cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from fedtune.errors import FedtuneError

Role = Literal["head", "body", "tail"]
ROLES: tuple[Role, ...] = ("head", "body", "tail")


@dataclass(frozen=True)
class Cut:
    """U shape: head = embeddings + blocks [0, k), body = blocks [k, m), tail = blocks [m, L) + final norm +
    task head."""

    k: int
    m: int

    def check(self, blocks: int) -> None:
        """Raise S701 unless 0 <= k < m <= `blocks`."""
        if not 0 <= self.k < self.m <= blocks:
            raise FedtuneError(
                "S701",
                f"a cut at blocks {self.k} and {self.m}",
                f"0 <= k < m <= {blocks}, the blocks of this model",
                "set k and m within them",
            )

    def span(self, role: Role, blocks: int) -> range:
        """The blocks of a part."""
        return {"head": range(self.k), "body": range(self.k, self.m), "tail": range(self.m, blocks)}[role]

    def held(self, holds: Iterable[Role], blocks: int) -> frozenset[int]:
        """The blocks of several parts."""
        return frozenset(number for role in holds for number in self.span(role, blocks))


@dataclass(frozen=True)
class Side:
    """What goes with a hidden state (B, T, d); the model's own code makes attention masks and rotary angles
    of it, on each side anew.

    mask       (B, T) uint8, 1 where there is a token; None where there is no padding
    positions  (B, T) int64; None for the model's own, which count from 0
    last       (B,) int64, the token that a generative classifier reads; known to the client alone, it never
               travels
    """

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    last: torch.Tensor | None = None
