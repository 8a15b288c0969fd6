"""Accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedtune.metrics.base import Metric, share


class Accuracy(Metric):
    """metric = "accuracy": the share of rows whose class is right, with its 95 % interval (Wilson)."""

    metric: Literal["accuracy"] = "accuracy"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "image-classify"})

    def measure(self, said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        return share("accuracy", [one == other for one, other in zip(said, wanted, strict=True)])
