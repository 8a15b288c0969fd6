"""fedtune compare says what differs, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedtune
from fedtune.cli import main
from fedtune.runtime.compare import compared, differing, shown, table
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


def test_a_key_of_one_recipe_alone_differs_and_names_do_not() -> None:
    recipes = [{"name": "a", "same": 1, "x": 1}, {"name": "b", "same": 1, "y": None}, {"same": 1, "x": 1}]
    assert differing(recipes) == {"x": [1, None, 1]}
    assert differing([{"x": 1}, {"x": 1, "y": 0}]) == {"y": [None, 0]}
    assert differing([{"x": 2}]) == {}


def test_figures_of_metrics_are_compared_by_their_names(tmp_path: Path) -> None:
    results = [{"federated": 0.5, "figures": {"f1": 0.25}}, {"federated": 0.75, "figures": None}, None]
    for number, result in enumerate(results):
        (tmp_path / f"r{number}").mkdir()
        (tmp_path / f"r{number}" / "config.json").write_text('{"rounds": 3}')
        if result is not None:
            (tmp_path / f"r{number}" / "result.json").write_text(json.dumps(result))
    found = compared([tmp_path / f"r{number}" for number in range(3)])
    assert found == {
        "runs": ["r0", "r1", "r2"],
        "recipe": {},
        "result": {"federated": [0.5, 0.75, None], "figures.f1": [0.25, None, None]},
    }


def test_the_table_is_aligned() -> None:
    content = {
        "runs": ["one", "another"],
        "recipe": {"seed": [1, 22]},
        "result": {"federated": [0.5, None], "state_sha256": ["a" * 64, "b" * 64]},
    }
    assert table(content) == [
        "                one           another",
        "recipe:",
        "  seed          1             22",
        "result:",
        "  federated     0.5000        -",
        "  state_sha256  aaaaaaaaaaaa  bbbbbbbbbbbb",
    ]
    assert table({"runs": ["r"], "recipe": {}, "result": {}}) == [
        "                   r",
        "recipe:",
        "  (no difference)",
        "result:",
        "  (none yet)",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.25, "0.2500"),
        (-999.5, "-999.5000"),
        (1000.0, "1,000"),
        (-123456.7, "-123,457"),
        (1234567, "1,234,567"),
        (True, "True"),
        ("a" * 64, "a" * 12),
        ("b" * 40, "b" * 40),
        ("c" * 41, "c" * 37 + "..."),
        ("d" * 65, "d" * 37 + "..."),
        ([1, 2], "[1, 2]"),
    ],
    ids=repr,
)
def test_values_in_a_column(value: object, text: str) -> None:
    assert shown(value) == text
