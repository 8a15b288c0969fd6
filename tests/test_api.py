"""The Python API: what a notebook needs, with nothing printed, several runs in one process, and nothing heavy
imported by `import fedtune`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fedtune
from fedtune.events import Event, RoundDone, RunStarted
from fedtune.runtime.folder import existing, recipe_of
from fedtune.runtime.run import run
from tests import small
from tests.waiting import PATIENCE


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small.write_rows(tmp_path)


def test_a_run_from_a_dict_and_its_model(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Event] = []
    result = fedtune.simulate(
        small.tree(tiny_bert, data),
        runs=tmp_path / "runs",
        on_event=told.append,
        rounds=2,
        method__adapter__rank=3,
    )
    assert result.rounds == 2 and result.metric == "accuracy" and result.folder == tmp_path / "runs" / "run"
    assert sum(isinstance(event, RoundDone) for event in told) == 2 and capsys.readouterr().out == ""
    again = fedtune.simulate(
        small.recipe(tiny_bert, data, rounds=2, method__adapter={"kind": "lora", "rank": 3}),
        runs=tmp_path / "runs",
    )
    assert again.state_sha256 == result.state_sha256 and again.folder.name == "run-2"
    assert (
        again.seconds < 60 and again.first_round_seconds <= again.seconds
    )  # its own clock, not that of the process
    with pytest.raises(AttributeError, match="a result has no 'nonsense'"):
        _ = result.nonsense
    model, tokenizer = fedtune.load(result.folder)
    with torch.no_grad():
        assert model(
            **tokenizer("the red fox", return_tensors="pt", return_token_type_ids=False)
        ).logits.shape == (1, 3)


def test_runs_in_threads_of_one_process_end_as_each_does_alone(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """With dropout, which draws from the one generator that torch has."""
    recipes = [
        small.recipe(tiny_bert, data, seed=seed, method__train={"lr": 0.01, "steps": 4, "batch": 4})
        for seed in (3, 4)
    ]
    together = threading.Barrier(2, timeout=PATIENCE)

    def ends(recipe: fedtune.Recipe, runs: str, meet: bool) -> str:
        def tell(event: Event) -> None:
            if meet and isinstance(event, RunStarted):
                together.wait()  # both have loaded, neither has trained

        return str(fedtune.simulate(recipe, runs=tmp_path / runs, on_event=tell).state_sha256)

    alone = [ends(recipe, "alone", False) for recipe in recipes]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ends, recipes, ("one", "two"), (True, True))) == alone and alone[0] != alone[1]


def test_what_one_does_with_a_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    runs = [
        fedtune.simulate(small.tree(tiny_bert, data, rounds=1, seed=seed), runs=tmp_path / "runs")
        for seed in (1, 2)
    ]
    scores = fedtune.evaluate(runs[0].folder)
    assert (
        scores["round"] == 1
        and len(scores["clients"]) == 4
        and fedtune.evaluate(runs[0].folder, data)["rows"] == 120
    )
    assert (
        fedtune.export(runs[0].folder, tmp_path / "one", rank=1) > 0
        and fedtune.export(runs[1].folder, tmp_path / "two") == 0
    )
    merged = fedtune.merge(
        [tmp_path / "one", tmp_path / "two"],
        tmp_path / "both",
        "ties",
        options={"density": 0.5},
        base=str(tiny_bert),
        run=runs[0].folder,
    )
    assert (
        merged.rank == 3
        and len(merged.scores) == 4
        and (tmp_path / "both" / "adapter_model.safetensors").exists()
    )
    with pytest.raises(fedtune.FedtuneError, match="R401"):
        fedtune.export(runs[0].folder, tmp_path / "one")


def test_a_run_event_by_event_and_left_early(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    tree = small.tree(tiny_bert, data)
    events = list(fedtune.stream(tree, runs=tmp_path / "runs"))
    assert sum(isinstance(event, RoundDone) for event in events) == 3
    for event in fedtune.stream(tree, runs=tmp_path / "runs", name="cut"):
        if isinstance(event, RoundDone):
            break
    folder = existing(tmp_path / "runs" / "cut")
    assert not (folder.path / "result.json").exists()
    whole = json.loads((tmp_path / "runs" / "run" / "result.json").read_text())
    assert run(recipe_of(folder), folder, lambda event: None)["state_sha256"] == whole["state_sha256"]
    with pytest.raises(fedtune.FedtuneError, match="C101"):
        list(fedtune.stream({"nonsense": 1}))


@pytest.mark.parametrize("kind", ["bias", "adapter", "full"])
def test_kinds_without_a_form_in_peft_load_too(
    kind: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    result = fedtune.simulate(
        small.tree(tiny_bert, data, rounds=1, method__adapter={"kind": kind}), runs=tmp_path / "runs"
    )
    model, _ = fedtune.load(result.folder / "adapter", base=str(tiny_bert))
    assert not model.training


def test_recipes_and_checks(tiny_bert: Path, data: Path) -> None:
    tree = small.tree(tiny_bert, data)
    first = fedtune.recipe(tree, method__server={"optimizer": "sgd", "lr": 0.5})
    assert (
        first.method.server.lr == 0.5
        and fedtune.recipe(first, rounds=9).rounds == 9
        and "server" not in tree["method"]
    )
    assert any(line.startswith("bytes") for line in fedtune.check(tree))
    with pytest.raises(fedtune.FedtuneError, match=r"C101.*nonsense"):
        fedtune.recipe(None, nonsense=1)
    with pytest.raises(fedtune.FedtuneError, match=r"M304.*no adapter of fedtune"):
        fedtune.load(data.parent)


def test_importing_fedtune_is_light() -> None:
    program = (
        "import fedtune, sys; fedtune.Recipe; print(sorted({'torch', 'transformers', 'flwr', 'grpc'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
