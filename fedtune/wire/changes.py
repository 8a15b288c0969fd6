"""A state of whole numbers as what changed of it: which numbers, and what they are now, exactly.

    for each tensor in name order: [how many, base 128][distances between them, Rice][the numbers, zigzag,
    Rice]

A number that does not travel is what the receiver holds of it, or 0 where it holds nothing. Numbers travel as
they are and not as differences: a
difference saves a bit or two, but would need every broadcast in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtune.schema import Schema
from fedtune.types import Tensors
from fedtune.wire import rice
from fedtune.wire.frame import damaged, refuse, to_varint, varint

ROOM = 2.0**61


def pack_changes(tensors: Tensors, changed: Tensors) -> bytes:
    """tensors: as `is_whole` asks; changed: bool, of the same names and shapes."""
    parts = []
    for name in sorted(tensors):
        places = np.flatnonzero(changed[name])
        numbers = tensors[name].reshape(-1)[places].astype(np.int64)
        gaps = np.diff(places, prepend=-1) - 1 if places.size < tensors[name].size else places[:0]
        parts += [
            to_varint(places.size),
            rice.pack(gaps.astype(np.uint64)),
            rice.pack(((numbers << 1) ^ (numbers >> 63)).view(np.uint64)),
        ]
    return b"".join(parts)


def unpack_changes(
    payload: memoryview, schema: Schema, types: Sequence[np.dtype[Any]], held: Tensors
) -> dict[str, np.ndarray]:
    """The tensors, each of its type, from what is held and what changed. Raises Refused W601, W603, W607."""
    data, at = bytes(payload), 0
    tensors = {}
    for (name, shape), kind in zip(schema.entries, types, strict=True):
        if kind.kind not in "iu":
            raise refuse(
                "W603",
                f"changes to '{name}' of type {kind}",
                "whole numbers",
                "use the same recipe on both sides",
            )
        size = math.prod(shape)
        count, at = varint(data, at)
        if count > size:
            raise damaged(f"{count} changes to {size} numbers")
        gaps, at = rice.unpack(data, at, count if count < size else 0)
        if gaps.size and int(gaps.max()) >= size:
            raise damaged("a change beyond the end of a tensor")
        places = np.cumsum(gaps.astype(np.int64) + 1) - 1 if count < size else np.arange(size)
        if count and int(places[-1]) >= size:
            raise damaged("a change beyond the end of a tensor")
        zigzag, at = rice.unpack(data, at, count)
        numbers = (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(np.int64)
        value = (
            held[name].astype(np.int64).reshape(-1)
            if name in held and held[name].shape == shape
            else np.zeros(size, np.int64)
        )
        value[places] = numbers
        span = np.iinfo(kind)
        if size and (int(value.min()) < span.min or int(value.max()) > span.max):
            raise refuse(
                "W607",
                f"a number in '{name}' that does not fit {kind}",
                "numbers of the declared type",
                "check the sender",
            )
        tensors[name] = value.astype(kind).reshape(shape)
    if at != len(data):
        raise damaged("changes that end before the message")
    return tensors


def is_whole(tensors: Tensors) -> bool:
    """Whether a state can travel as changes: whole numbers that leave room for the sign of the zigzag."""
    return bool(tensors) and all(
        isinstance(value, np.ndarray)
        and value.dtype.kind in "iu"
        and (
            value.dtype.itemsize < 8 or not value.size or bool(np.abs(value.astype(np.float64)).max() < ROOM)
        )
        for value in tensors.values()
    )
