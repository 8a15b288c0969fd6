"""Sweeps: every combination and seed, the table, a kill in the middle, losers that stop early, Optuna."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.sweeps.plan import grid
from fedtune.sweeps.search import suggestions
from tests import small
from tests.forked import Program
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def recipe(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sweep")
    return small.write_recipe(place / "mine.toml", tiny_bert, small.write_rows(place, 60), rounds=2)


GRID = ["--grid", "method.adapter.rank=1,2", "--grid", "method.train.lr=0.001,0.03", "--seeds", "2"]


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["sweep", str(recipe), *GRID, "--to", str(folder)]) == 0
    return folder


def states(folder: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["state_sha256"]
        for path in sorted(folder.glob("runs/*/result.json"))
    }


@pytest.mark.thorough
def test_the_table_is_of_all_runs(whole: Path) -> None:
    assert len(states(whole)) == 8
    rows = json.loads((whole / "table.json").read_text())["rows"]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    first = next(row for row in rows if (row["method.adapter.rank"], row["method.train.lr"]) == (1, 0.001))
    results = [
        json.loads((whole / "runs" / f"001-seed-{seed}" / "result.json").read_text()) for seed in (3, 4)
    ]
    test = [result["federated"] for result in results]
    assert first["test"] == statistics.fmean(test) and first["test_std"] == statistics.stdev(test)
    assert first["score"] == statistics.fmean(result["best"]["value"] for result in results)
    assert results[0]["best"]["of"] == "held-out rows"  # a choice by the test set would flatter
    assert results[0]["base"] is None and results[0]["local"] is None
    with (whole / "table.csv").open() as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [row["score"] for row in rows]


def test_a_run_of_a_sweep_is_the_run_of_its_recipe(recipe: Path, whole: Path, tmp_path: Path) -> None:
    alone = fedtune.simulate(
        recipe, runs=tmp_path, seed=4, method__adapter__rank=2, method__train__lr=0.03, evaluate__every=2
    )
    assert states(whole)["004-seed-4"] == alone.state_sha256


@pytest.mark.thorough
def test_a_sweep_that_was_killed_goes_on(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Two runs at once, killed in the middle; the same command does the rest, and runs that were through stay as they
    are."""
    command = ["sweep", str(recipe), *GRID, "--to", str(tmp_path), "--jobs", "2"]
    work = Program("-m", "fedtune", *command)
    wait_for(lambda: bool(states(tmp_path)) or work.poll() is not None, "the first result")
    work.kill_all()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert 1 <= len(done) < 8
    assert main(command[:-2]) == 0
    assert states(tmp_path) == states(whole)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_another_sweep_is_not_mixed_in(recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["sweep", str(recipe), "--grid", "method.adapter.rank=1,3", "--to", str(whole)]
    assert main(other) == 2 and "R406" in capsys.readouterr().err
    assert len(states(whole)) == 8


@pytest.mark.thorough
def test_losers_stop_early(recipe: Path, tmp_path: Path) -> None:
    """A rate that moves nothing does not get to the last round; the winner's bytes are those of a run of its own."""
    told: list[str] = []
    rows = fedtune.sweep(
        recipe,
        grid={"method.train.lr": [1e-7, 0.03]},
        halve=2,
        rounds=4,
        to=tmp_path / "sweep",
        on_run=told.append,
    )
    assert [(row["method.train.lr"], row["rounds"]) for row in rows] == [(0.03, 4), (1e-7, 2)]
    assert len(told) == 3
    alone = fedtune.simulate(recipe, runs=tmp_path, rounds=4, method__train__lr=0.03, evaluate__every=4)
    assert states(tmp_path / "sweep")["002-seed-3"] == alone.state_sha256
    with pytest.raises(FedtuneError, match=r"C104: found --halve with method\.train\.schedule"):
        fedtune.sweep(recipe, halve=2, to=tmp_path / "other", method__train__schedule="linear")


def test_optuna_suggests_and_a_sweep_goes_on_alike(recipe: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {
        "samples": ["method.train.lr=log:1e-4..1e-1", "method.adapter.rank=1..4"],
        "rounds": 1,
    }
    four = fedtune.sweep(recipe, trials=4, to=tmp_path / "four", **known)
    assert len({row["method.train.lr"] for row in four}) == 4
    assert all(
        1e-4 <= row["method.train.lr"] <= 1e-1 and 1 <= row["method.adapter.rank"] <= 4 for row in four
    )
    before = states(tmp_path / "four")
    (tmp_path / "four" / "runs" / "004-seed-3" / "result.json").unlink()  # as if it had been killed there
    again = fedtune.sweep(recipe, trials=4, to=tmp_path / "four", **known)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in four]
    assert states(tmp_path / "four") == before


def test_a_trial_that_fails_is_a_row(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["sweep", str(recipe), "--grid", "method.adapter.targets=all-linear", "--set", "rounds=1"]
    told[3] = 'method.adapter.targets=["nothing"],["query"]'
    assert main([*told, "--to", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "M302" in said and "accuracy (test)" in said
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [bool(row["failed"]) for row in rows] == [False, True]


def test_a_missing_optuna_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FedtuneError, match=r"C107.*pip install 'fedtune\[sweep\]'"):
        next(suggestions(["rounds=1..2"], 1, 0))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grid", "rank"],
        ["--grid", "rounds=1,2", "--grid", "rounds=3"],
        ["--grid", "rounds=1,,2"],
        ["--seeds", "0"],
        ["--halve", "1"],
        ["--trials", "2"],
        ["--trials", "2", "--sample", "rounds=3..1"],
        ["--sample", "rounds=1..3"],
        ["--trials", "2", "--sample", "method.train.lr=log:0..1"],
    ],
)
def test_mistakes_are_sentences(
    arguments: list[str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(recipe), *arguments, "--to", str(tmp_path / "s")]) == 2
    assert "C103" in capsys.readouterr().err


def test_a_mistake_in_the_last_trial_shows_before_the_first_runs(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="C102"):
        fedtune.sweep(recipe, grid={"method.adapter.rank": [1, 0]}, to=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_values_of_a_grid() -> None:
    assert grid(['a.b=["q", "v"],all,1e-3', "c=true"]) == [
        {"a.b": ["q", "v"], "c": True},
        {"a.b": "all", "c": True},
        {"a.b": 1e-3, "c": True},
    ]
    assert grid([]) == [{}]
