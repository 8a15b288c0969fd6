"""Answers in whole numbers: means that integers hold exactly, each tensor of a declared type and within a
declared bound.

A server that adds such answers gets the same sum in any order, and can divide it without a float: what
FedKSeed's replay rests on.
"""

from __future__ import annotations

import math

import numpy as np

from fedtune.schema import Schema
from fedtune.types import Update
from fedtune.wire.frame import refuse

MOST = 1 << 53  # of one answer's number times its weight: a thousand answers add up within int64


def pack_whole(update: Update, whole: tuple[tuple[str, str, int], ...]) -> dict[str, np.ndarray]:
    """The means of int64 tensors in the types of the wire. Raises ValueError where they are not as declared:
    the method's mistake."""
    weight = whole_weight(update.weight)
    if not weight or {name for name, _, _ in whole} != update.tensors.keys():
        raise ValueError(
            f"whole numbers need a whole weight (here {update.weight}) and a declared type for each tensor"
        )
    out = {}
    for name, kind, most in whole:
        mean, rest = np.divmod(update.tensors[name], weight)
        if rest.any() or (mean.size and int(np.abs(mean).max()) > most):
            raise ValueError(f"'{name}' is not its weight times whole numbers within {most}")
        out[name] = mean.astype(kind)
    return out


def unpack_whole(payload: memoryview, schema: Schema, weight: float) -> dict[str, np.ndarray]:
    """The tensors times the weight, int64. The guard has seen sizes and types. Raises Refused W606, W607."""
    times = whole_weight(weight)
    if not times or times * max(most for _, _, most in schema.whole) > MOST:
        raise refuse(
            "W606",
            f"weight {weight:g} of whole numbers",
            "a whole number whose products stay below 2**53",
            "check the sender's count of examples",
        )
    tensors, at = {}, 0
    for (name, shape), (_, kind, most) in zip(schema.entries, schema.whole, strict=True):
        stored = np.dtype(kind)
        value = (
            np.frombuffer(payload, stored.newbyteorder("<"), math.prod(shape), at)
            .astype(np.int64)
            .reshape(shape)
        )
        if value.size and max(int(value.max()), -int(value.min())) > most:
            raise refuse(
                "W607",
                f"{max(int(value.max()), -int(value.min()))} in '{name}'",
                f"whole numbers within {most}",
                "check the sender's training",
            )
        tensors[name] = value * times
        at += value.size * stored.itemsize
    return tensors


def whole_weight(weight: float) -> int:
    """The weight as a whole number of at least 1; 0 where it is none."""
    return int(weight) if weight >= 1 and float(weight).is_integer() else 0
