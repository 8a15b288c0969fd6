"""Names, shapes and kinds of the tensors that travel, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Schema:
    """Sorted (name, shape) pairs; all values are float32 unless `whole` or a transform says otherwise.

    whole  of tensors of whole numbers, either all or none: name, type on the wire, largest absolute value

    >>> Schema.of({"b": np.zeros((2, 3)), "a": np.zeros(4)}).count
    10
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]
    whole: tuple[tuple[str, str, int], ...] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> Schema:
        return cls(tuple((name, tuple(int(n) for n in tensors[name].shape)) for name in sorted(tensors)))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.entries)

    @cached_property
    def count(self) -> int:
        """Number of values in all tensors."""
        return sum(int(np.prod(shape, dtype=np.int64)) for _, shape in self.entries)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of names and shapes (and of the whole numbers' types and bounds), as
        hex."""
        known = [self.entries, self.whole] if self.whole else self.entries
        return hashlib.sha256(json.dumps(known, separators=(",", ":")).encode()).hexdigest()


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes in name order, as hex: equal states, equal
    digests."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = np.asarray(tensors[name], order="C")  # ascontiguousarray would make a scalar a vector
        value = value.astype(value.dtype.newbyteorder("<"), copy=False)
        total.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        total.update(value.data)
    return total.hexdigest()
