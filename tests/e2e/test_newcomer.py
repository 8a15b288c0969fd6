"""A newcomer's path as it is run, from an empty folder with a CSV file: each command is one that the command before
it has named, and none needs a page."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import small, tiny
from tests.forked import run_fedtune

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    tiny.bert(folder / "model")
    rows = small.rows(90)
    with (folder / "notes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


def fedtune(home: Path, *words: str) -> str:
    """What a command prints; its seconds go to the test's own output."""
    began = time.perf_counter()
    done = run_fedtune(*words, cwd=home)
    print(f"fedtune {' '.join(words)}: {time.perf_counter() - began:.1f} s")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_file_to_predictions(home: Path) -> None:
    assert "init" in fedtune(home, "--help")

    said = fedtune(home, "init", "notes.csv", "--model", "model")
    named = [line.split() for line in said.splitlines() if line.startswith("  fedtune ")]
    assert [words[1] for words in named] == ["data", "check", "simulate"]
    looked, checked = (fedtune(home, *words[1:]) for words in named[:2])
    assert "labels    3" in looked and "clients   4," in checked and "per client and round" in checked

    quick = ["--set", "rounds=2", "--set", "evaluate.local=false", "--set", "evaluate.centralised=false"]
    said = fedtune(home, *named[2][1:], *quick)
    run = home / "runs" / "notes"
    assert "federated" in said and str(run / "adapter") in said.replace("runs/notes", str(run))
    then = [line.partition("#")[0].split() for line in said.splitlines() if line.startswith("  fedtune ")]
    assert [words[1:3] for words in then] == [
        [verb, "runs/notes"] for verb in ("report", "predict", "export")
    ]

    fedtune(home, *then[0][1:])
    assert "</html>" in (run / "report.html").read_text()
    fedtune(home, *then[1][1:-1], "notes.csv", "--to", "said.csv")
    with (home / "said.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90 and {row["prediction"] for row in rows} <= set(small.WORDS)
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    assert json.loads((run / "data.json").read_text())["labels"] == sorted(small.WORDS)


@pytest.mark.slow
def test_the_whole_path_from_an_empty_environment(tmp_path: Path) -> None:
    """The README's command, the built-in run and the commands of getting started: benchmarks/newcomer.py."""
    out = tmp_path / "steps.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "newcomer.py", "--out", out], check=True)
    steps = [step["step"] for step in json.loads(out.read_text())["steps"]]
    verbs = ["simulate", "init", "data", "check", "simulate", "report", "predict"]
    assert steps[0].startswith("pip install") and [step.split()[1] for step in steps[1:]] == verbs


def test_the_first_mistakes_are_sentences(home: Path) -> None:
    for words, expected in (
        (["init", "nothing.csv"], "D201"),
        (["simulate", "nothing.toml"], "C105"),
        (["predict", "runs/nothing", "notes.csv"], "M304"),
    ):
        done = run_fedtune(*words, cwd=home)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
