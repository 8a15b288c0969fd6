"""Rows that stand beside a recipe's own, in the form of its [data]: rows to score, canaries, and what a
model's owner distils on."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.data import Rows, load_slice
from fedtune.data.settings import Source
from fedtune.data.sources import data_at


def rows_at(
    data: Source, path: str, labels: Sequence[str], seed: int, whose: str
) -> tuple[Rows, dict[str, int]]:
    """All rows of a file or folder, and those that were left out, by the reason. Raises D201 to D204,
    D206."""
    at = data_at(data, path, labels=tuple(labels), client_test_share=0.0, limit=0)
    mine, dropped = load_slice(at, seed, 0, whose)
    return [*mine.train, *mine.test], dropped
