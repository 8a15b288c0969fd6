"""Where the coordinator has no rows, sites score what they hold out; the figure is that of all their rows together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.data import load
from fedtune.events import Noted
from fedtune.runtime.folder import create
from fedtune.runtime.run import run
from tests import small

SHARE = {"data__client_test_share": 0.3, "data__test_share": 0.2}


def at_sites(recipe: Recipe, root: Path) -> tuple[dict[str, Any], list[str]]:
    """A run of clients whose coordinator holds nothing to score on: its result, and what it noted."""
    known = load(recipe.data, recipe.partition, recipe.seed)
    folder, notes = create(root, "", "sites"), list[str]()
    folder.begin(recipe)
    result = run(recipe, folder, lambda event: notes.append(event.text) if isinstance(event, Noted) else None, None, replace(known, test=[]))
    return result, notes


@pytest.mark.parametrize("method", [{}, {"method": {"type": "fedkseed", "steps": 3}}], ids=["fedpeft", "fedkseed"])
def test_the_sites_score_is_the_mean_over_all_rows_that_they_hold_out(method: dict[str, Any], tiny_bert: Path, tmp_path: Path) -> None:
    data = small.write_rows(tmp_path)
    recipe = small.recipe(tiny_bert, data, **SHARE, **method)
    found, _ = at_sites(recipe, tmp_path)
    _, whole, _ = small.play(small.recipe(tiny_bert, data, **SHARE, **method, evaluate__clients=True), tmp_path)
    own = whole["phases"]["clients_metric"].values()
    rows = sum(one["count"] for one in own)
    assert found["state_sha256"] == whole["state_sha256"] and rows > 20
    assert found["metric"] == "accuracy" and found["federated"] == pytest.approx(sum(one["metric"] * one["count"] for one in own) / rows, abs=1e-9)
    assert found["phases"]["loss"]["federated"] == pytest.approx(sum(one["loss"] * one["count"] for one in own) / rows, abs=1e-6)


def test_clients_that_hold_nothing_out_leave_the_run_unscored_with_a_note(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), data__client_test_share=0.0)
    found, notes = at_sites(recipe, tmp_path)
    assert found["metric"] == "" and found["federated"] is None and found["rounds"] == 3
    assert any("not scored at the sites" in note and "D202" in note for note in notes)
