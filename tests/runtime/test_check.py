"""What a check says of costs that a recipe does not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.runtime.check import check, costs_of_comparing
from tests import small


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sampling": {"count": 1}},
            "each of 4 clients alone: 12 rounds of a client's training, where the run has 3;",
        ),
        (
            {"evaluate": {"local": True, "seeds": 2}},
            "24 rounds of a client's training, where the run has 12;",
        ),
        ({}, ""),
        ({"sampling": {"count": 1}, "evaluate": {"local": False}}, ""),
    ],
    ids=str,
)
def test_training_each_client_alone(changes: dict[str, Any], said: str, tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, **{"evaluate": {"local": True}, **changes})
    remarks = " ".join(one for one in check(recipe).remarks if one.startswith("compare"))
    assert said in remarks and bool(said) == bool(remarks)


def test_real_sites_are_not_trained_alone(tiny_bert: Path, data: Path) -> None:
    """Whose rows are theirs."""
    recipe = small.recipe(tiny_bert, data, data__path="", deploy={"data": "sites"}, data__labels=["a", "b"])
    assert not costs_of_comparing(recipe.model_copy(update={"evaluate": recipe.evaluate}), 1, 100)
