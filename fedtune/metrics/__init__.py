"""Figures of the final model: what it said, compared with what was wanted. One short file a metric; no torch.

A metric is registered by its place in `MetricTable`.
"""

from fedtune.metrics.base import Metric, share, wilson
from fedtune.metrics.registry import METRICS, GenerateSettings, MetricTable, metrics_of

__all__ = ["METRICS", "GenerateSettings", "Metric", "MetricTable", "metrics_of", "share", "wilson"]
