"""What a check says of costs that a recipe does not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.model.kept_front import rows_of
from fedtune.runtime.check import check, costs_of_comparing, rows
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


@pytest.mark.parametrize("task", ["classify", "causal-lm"])
def test_what_frozen_blocks_said_is_counted(task: str, tiny_bert: Path, tiny_llama: Path, data: Path) -> None:
    """As many bytes as the rows take that a run keeps."""
    model, more = (tiny_bert, {}) if task == "classify" else (tiny_llama, {"data__task": task})
    adapter = {"kind": "lora", "rank": 2, "last": 1, "keep_front": True}
    recipe = small.recipe(model, data, method__adapter=adapter, **more)
    checked = check(recipe)
    workspace, _ = small.workspace_of(recipe)
    taken = [
        sum(row.numel() * row.element_size() for row in rows_of(workspace.tunable, workspace.train(number)))
        for number in workspace.names
    ]
    assert checked.memory["outputs of frozen blocks, of the client with most"] == max(taken) > 0
    assert f"holds {sum(taken) / 2**20:,.1f} MiB of outputs of frozen blocks" in "\n".join(rows(checked))
    plain = check(small.recipe(model, data, method__adapter=adapter | {"keep_front": False}, **more))
    assert not any("frozen" in what for what in plain.memory) and "frozen" not in "\n".join(rows(plain))


def test_what_frozen_blocks_said_of_many_rows_is_reckoned_from_the_first(
    tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"kind": "lora", "rank": 2, "last": 1, "keep_front": True}
    recipe = small.recipe(tiny_bert, data, method__adapter=adapter)
    of_all = check(recipe).memory["outputs of frozen blocks, of the client with most"]
    monkeypatch.setattr("fedtune.runtime.check.TRIED", 5)
    reckoned = check(recipe).memory["outputs of frozen blocks, of the client with most"]
    assert reckoned == pytest.approx(of_all, rel=0.25)
