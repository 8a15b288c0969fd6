"""Where each parameter stands in the one flat order that all directions are indexed by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.schema import Schema


@dataclass(frozen=True)
class Layout:
    """Sorted names, each tensor in C order, one after the other: independent of how a model is loaded,
    sharded or fused.

    offsets  name -> index of its first value
    count    number of values in all

    >>> Layout.of({"b": (2, 3), "a": (4,)}).offsets
    {'a': 0, 'b': 4}
    """

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    count: int

    @classmethod
    def of(cls, tensors: Schema | Mapping[str, Any]) -> Layout:
        """From a schema, or from a mapping of names to shapes, arrays or tensors."""
        shapes = (
            tensors.shapes
            if isinstance(tensors, Schema)
            else {name: getattr(value, "shape", value) for name, value in tensors.items()}
        )
        offsets, sizes, count = {}, {}, 0
        for name in sorted(shapes):
            offsets[name], sizes[name] = count, math.prod(int(n) for n in shapes[name])
            count += sizes[name]
        return cls(offsets, sizes, count)
