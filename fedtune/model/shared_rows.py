"""Vectors of examples' tokens in memory that this process shares with its forks: whichever computes them, all
have them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

HEADER = 8  # bytes of the key; 0: nothing is there


class SharedRows:
    """(tokens, width) of every example, float32, under a key that says what they were made of. The system
    gives memory as it is written to, and takes it back with the last process that can read it."""

    def __init__(self) -> None:
        self._key: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def reserve(self, lengths: Sequence[int], width: int) -> None:
        """Room for examples of so many tokens; once. Forks made before this have memory of their own."""
        if self._key is not None:
            return
        total = sum(lengths)
        memory = mmap.mmap(-1, HEADER + 4 * total * width)  # nobody's file, and shared
        self._key = torch.frombuffer(memory, dtype=torch.int64, count=1)
        if total:
            values = torch.frombuffer(memory, dtype=torch.float32, offset=HEADER).view(total, width)
            self._rows = list(values.split(list(lengths)))

    def known(self, key: int) -> bool:
        return self._key is not None and int(self._key) == key

    @property
    def rows(self) -> list[torch.Tensor]:
        """Of every example; what is written into them is there for all once `done` has been said."""
        return self._rows

    def done(self, key: int) -> None:
        """All rows have been written, of what `key` stands for."""
        assert self._key is not None and key
        self._key.fill_(key)
