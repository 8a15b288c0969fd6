"""A model as it is, where a test compares with what an adapter makes of it."""

from __future__ import annotations

from fedtune.model.base import Base
from fedtune.model.tunable import TunableModel, detach


def bare(base: Base) -> TunableModel:
    """The base with nothing to train; an adapter that sits on it is taken off."""
    if base.attached is not None:
        detach(base.attached)
    return TunableModel(base, None, base.net, {}, [], base.size)
