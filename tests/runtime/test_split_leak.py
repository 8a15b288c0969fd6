"""The report of the attacks on a cut: shares, and what they mean."""

from __future__ import annotations

from pathlib import Path

from fedtune.runtime.split_leak import sentences
from fedtune.split.inversion import Leak
from tests import small


def test_the_worst_attack_is_what_counts() -> None:
    recipe = small.recipe(Path("m"), Path("rows.jsonl"))
    found = {
        "the head's answer": Leak("search", 0.25, 0.5, 12),
        "sent as int8": Leak("search", 0.75, 0.125, 12),
    }
    said = sentences(recipe, found)
    assert said[:2] == [
        "the head's answer     search: recovered 25.0 % of 12 tokens, relative squared error 0.5",
        "sent as int8          search: recovered 75.0 % of 12 tokens, relative squared error 0.12",
    ]
    assert "can reconstruct 75 % of these tokens." in said[2] and len(said) == 3


def test_all_and_less_than_half() -> None:
    pictures = small.recipe(Path("m"), Path("rows"), data__task="image-classify")

    def said(share: float) -> list[str]:
        return sentences(pictures, {"x": Leak("gradient", share, 0.5, 3)})

    assert "of 3 images" in said(1.0)[0] and "can reconstruct all these images." in said(1.0)[1]
    assert "can reconstruct 99 % of these images." in said(0.99)[1]
    assert len(said(0.5)) == 2 and len(said(0.49)) == 3 and "protects nobody" in said(0.49)[2]
