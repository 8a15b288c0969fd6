"""Rouge-L, by Google's rouge-score."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from fedtune.extras import missing
from fedtune.metrics.base import Metric


class RougeL(Metric):
    """metric = "rouge-l": the F measure of the longest common subsequence of words (Lin 2004); needs the
    package rouge-score."""

    metric: Literal["rouge-l"] = "rouge-l"
    stemmer: bool = False
    """Compare stems of English words."""

    def ready(self) -> None:
        if find_spec("rouge_score") is None:
            raise missing("rouge_score", "metrics", "metric = 'rouge-l'", "D208")

    def measure(self, said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        self.ready()
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=self.stemmer)
        pairs = zip(said, wanted, strict=True)
        return {
            "rouge_l": statistics.fmean(scorer.score(other, one)["rougeL"].fmeasure for one, other in pairs)
        }
