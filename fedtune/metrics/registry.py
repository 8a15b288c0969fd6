"""Every metric that a recipe can name. Its place in this union registers it, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.metrics.accuracy import Accuracy
from fedtune.metrics.answer import Answer
from fedtune.metrics.base import Metric
from fedtune.metrics.exact_match import ExactMatch
from fedtune.metrics.macro_f1 import MacroF1
from fedtune.metrics.rouge_l import RougeL
from fedtune.plugins import extended
from fedtune.settings import Settings, classes_by_tag

MetricTable = Annotated[Accuracy | MacroF1 | ExactMatch | RougeL | Answer, Field(discriminator="metric")]
if not TYPE_CHECKING:
    MetricTable = extended(MetricTable, "metric", "metrics", Metric)

METRICS: dict[str, type[Metric]] = classes_by_tag(MetricTable, "metric")


class GenerateSettings(Settings):
    """[generate]: the responses that [[metrics]] look at (instruct): greedy, in the model's template."""

    rows: int = Field(100, ge=1)
    """So many rows of the test set at most, drawn with the run's seed."""
    tokens: int = Field(128, ge=1, le=4096)
    """Longest response, in tokens."""
    batch: int = Field(8, ge=1)
    """Responses that are written at once."""
    samples: int = Field(3, ge=0)
    """So many of them are kept in the result, before and after training."""


def metrics_of(chosen: Sequence[Metric], task: str) -> Sequence[Metric]:
    """The recipe's metrics; classes are always told with their interval and macro F1."""
    labels = task in ("classify", "image-classify")
    return tuple(chosen) or ((Accuracy(), MacroF1()) if labels else ())
