"""Macro F1."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

from fedtune.metrics.base import Metric


class MacroF1(Metric):
    """metric = "macro-f1": the mean over classes of each class's F1, so that rare classes count like frequent
    ones; over the classes that stand in the test set or were said."""

    metric: Literal["macro-f1"] = "macro-f1"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "image-classify"})

    def measure(self, said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        right = Counter(one for one, other in zip(said, wanted, strict=True) if one == other)
        claimed, there = Counter(said), Counter(wanted)
        f1 = [2 * right[label] / (claimed[label] + there[label]) for label in claimed | there]
        return {"macro_f1": statistics.fmean(f1)}
