"""A run that does not learn says so while it costs little to begin again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedtune.events import Noted
from fedtune.runtime.first_rounds import not_learning
from tests import small, tiny


@pytest.mark.parametrize(
    ("losses", "classes", "said"),
    [
        ([5.0, 5.0, 4.99], 150, "too low"),
        ([5.0, 5.2, 6.0], 150, "too high"),
        ([5.0, 4.5, 4.0], 150, ""),
        ([0.25, 0.26, 0.29], 150, ""),  # behind class means there is little left to learn
        ([2.6, 2.7, 2.9], 0, "too high"),
        ([2.6, 2.5, 2.4], 0, ""),
        ([5.0, 5.0], 150, ""),
        ([5.0, 5.0, 5.0, 5.0], 150, ""),
        ([5.0, math.nan, 5.0], 150, ""),
    ],
)
def test_a_loss_that_does_not_fall_is_told_once(losses: list[float], classes: int, said: str) -> None:
    text = not_learning(losses, classes, "adamw at 1e-09", "adamw at 0.002")
    assert said in text and bool(said) == bool(text)
    assert not said or "(adamw at 1e-09); 'auto' takes adamw at 0.002" in text


@pytest.mark.parametrize(("lr", "said"), [(1e-9, "too low"), (0.02, "")])
def test_a_run_with_a_rate_that_does_nothing_says_so(tmp_path: Path, lr: float, said: str) -> None:
    train = {"lr": lr, "steps": 0, "epochs": 3, "batch": 64}
    recipe = small.recipe(
        tiny.bert(tmp_path / "model"), small.write_rows(tmp_path), rounds=4, method__train=train
    )
    notes = [event.text for event in small.play(recipe, tmp_path / "run")[2] if isinstance(event, Noted)]
    found = [text for text in notes if "the training loss does not fall" in text]
    assert len(found) == bool(said) and all(said in text and "'auto' takes" in text for text in found)
