"""An answer that is no longer than a bound, and says nothing beside its numbers."""

from __future__ import annotations

import math

import numpy as np

from fedtune.errors import ClientFailed
from fedtune.types import Update


def bounded(update: Update, clip: float, name: str, fill: bool = False) -> Update:
    """The update with weight 1, at most `clip` long (0: however long), and without figures, which no noise
    covers. `fill`: a shorter one becomes as long. Raises ClientFailed W607 for a length that is not
    finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = {key: np.asarray(value) / update.weight for key, value in update.tensors.items()}
        norm = length(values)
    if not math.isfinite(norm):
        raise ClientFailed(
            "W607",
            f"an answer of client '{name}' whose length is {norm}",
            "finite numbers",
            "lower the learning rate or set method.train.clip",
        )
    factor = factor_to(norm, clip, fill)
    return Update({key: value * factor for key, value in values.items()}, notes=update.notes)


def factor_to(norm: float, clip: float, fill: bool) -> float:
    """What takes a length to `clip` at most (0: however long); `fill`: to `clip`, unless it is nothing."""
    return clip / norm if clip and (norm > clip or (fill and norm)) else 1.0


def length(values: dict[str, np.ndarray]) -> float:
    """L2 norm over all tensors together."""
    return math.sqrt(sum(float(np.vdot(value, value)) for _, value in sorted(values.items())))


def to_length(clip: float, fill: bool) -> str:
    """What `bounded` does, in words."""
    return f"{'brought' if fill else 'cut'} to a length of {clip:g}"
