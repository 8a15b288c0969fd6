"""fedtune compare says what differs, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedtune
from fedtune.cli import main
from tests import small


@pytest.fixture(scope="module")
def runs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("compare")
    tree = small.tree(tiny_bert, small.write_rows(place), rounds=1)
    other = small.tree(tiny_bert, place / "rows.jsonl", rounds=1, method__adapter__rank=4)
    other["chain"] = [{"step": "quantize", "bits": 4}]
    return [fedtune.simulate(one, runs=place / "runs").folder for one in (tree, other)]


def test_recipes_and_results_differ_where_they_do(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, runs), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] == ["run", "run-2"]
    assert said["recipe"]["method.adapter.rank"] == [2, 4]
    assert said["recipe"]["chain.0.bits"] == [None, 4]
    assert not any(key.startswith(("data.", "model.", "evaluate.")) for key in said["recipe"])
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert said["result"]["federated"] == [result["federated"] for result in results]
    assert "local" not in said["result"]  # which no run has

    assert main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "adapter.rank" in line).split() == ["method.adapter.rank", "2", "4"]
    assert next(line for line in lines if "chain.0.bits" in line).split() == ["chain.0.bits", "-", "4"]


def test_the_same_run_differs_in_nothing(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0]), str(runs[0])]) == 0
    assert "(no difference)" in capsys.readouterr().out
    assert main(["compare", str(runs[0] / "adapter")]) == 2 and "R402" in capsys.readouterr().err
