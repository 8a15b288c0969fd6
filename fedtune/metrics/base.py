"""What every metric is: a table of settings that compares what a model said with what was wanted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from fedtune.settings import Settings

SURE = 0.95  # of the intervals that are given with shares


class Metric(Settings):
    """[[metrics]]: a figure of the final model on the test set. The union of these classes is the registry
    (registry.py).

    tasks  that it can be asked of: classify and image-classify (labels), instruct (texts that are generated)
    """

    metric: str
    tasks: ClassVar[frozenset[str]] = frozenset({"instruct"})

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if recipe.data.task not in self.tasks:
            yield (
                f"metric = '{self.metric}' with data.task = '{recipe.data.task}'",
                f"one of {', '.join(sorted(self.tasks))}",
                "remove it from [[metrics]]",
            )

    def ready(self) -> None:
        """Raises D208 where a package is missing; asked before the first round."""

    def measure(self, said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Figures by name, of at least one pair of texts or labels."""
        raise NotImplementedError(f"'{self.metric}' measures nothing")


def share(name: str, right: Sequence[float]) -> dict[str, float]:
    """A share of rows, with its interval; a row may count in part."""
    low, high = wilson(sum(right), len(right))
    return {name: sum(right) / len(right), f"{name}_low": low, f"{name}_high": high}


def wilson(right: float, count: int, sure: float = SURE) -> tuple[float, float]:
    """The interval in which a share lies that was seen as `right` of `count` (Wilson 1927).

    >>> [round(end, 3) for end in wilson(8, 10)], [round(end, 3) for end in wilson(0, 10)]
    ([0.49, 0.943], [0.0, 0.278])
    """
    z2 = statistics.NormalDist().inv_cdf(0.5 + sure / 2) ** 2
    seen = right / count
    middle = seen + z2 / (2 * count)
    reach = (z2 * (seen * (1 - seen) / count + z2 / (4 * count * count))) ** 0.5
    whole = 1 + z2 / count
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)
