"""Exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from fedtune.metrics.base import Metric, share


class ExactMatch(Metric):
    """metric = "exact-match": the share of responses that are the wanted ones, but for blanks."""

    metric: Literal["exact-match"] = "exact-match"
    lower: bool = True
    """Upper and lower case are the same."""
    punctuation: bool = False
    """Whether punctuation counts."""

    def measure(self, said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        pairs = zip(said, wanted, strict=True)
        return share("exact_match", [self.plain(one) == self.plain(other) for one, other in pairs])

    def plain(self, text: str) -> str:
        text = text.lower() if self.lower else text
        return " ".join((text if self.punctuation else re.sub(r"[^\w\s]", " ", text)).split())
