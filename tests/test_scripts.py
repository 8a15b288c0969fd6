"""Every benchmark and every recording script is started here on a tiny case: a name that moved is noticed the
same day. Their figures mean nothing here."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked, tiny

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    [
        "benchmarks/peers/compare.py",
        *(
            str(path.relative_to(ROOT))
            for folder in ("benchmarks", "simulations")
            for path in (ROOT / folder).glob("*.py")
            if path.name not in ("claims.py", "experts_table.py")  # which others import
        ),
    ]
)
LONG = {
    "benchmarks/deployment.py",
    "benchmarks/simulation.py",
    "benchmarks/local_workers.py",
    "benchmarks/threads.py",
}  # whole runs in processes of their own
Start = Callable[..., Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a script as Python does when it is run from its folder, under a name of its own."""
    before = set(sys.modules)

    def loaded(path: str) -> Any:
        monkeypatch.syspath_prepend(str((ROOT / path).parent))
        spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
        assert spec and spec.loader
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield loaded
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(
            (str(ROOT / "benchmarks"), str(ROOT / "simulations"))
        ):
            del sys.modules[name]  # there are two called `record`


@pytest.fixture
def start(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Start:
    def started(path: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        script = load(path)
        if "peers" not in path:  # which gives its programs other environments
            monkeypatch.setattr(subprocess, "run", forked.run)
        script.main()

    return started


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_can_be_imported_and_explains_itself(
    path: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        start(path, "--help")
    assert ended.value.code == 0 and path.rpartition("/")[2] in capsys.readouterr().out


# --- benchmarks: their last line is a list of claims ---


@pytest.mark.thorough
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path in LONG else [])
        for path in SCRIPTS
        if path.startswith("benchmarks/") and "record" not in path and "peers" not in path
    ],
)
def test_a_benchmark_ends_with_its_claims(
    path: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(path, "--tiny")
    claims = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert claims and all(
        claim.keys() == {"claim", "ours", "other", "ratio", "goal", "met"} for claim in claims
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["plain", "local"])
def test_both_sides_of_the_simulation_benchmark(
    kind: str, load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    load("benchmarks/simulation.py").worker(kind, 2, 1, 1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["round_seconds"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--only", "loop", "fedtune", "nvflare", "--turns", "1", "--cases"], id="quick"),
        pytest.param(
            ["--only", "loop", "fedtune", "flower", "fedtune-flower"], id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_peers_are_compared(
    more: list[str], start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start("benchmarks/peers/compare.py", "--tiny", *more, "--out", tmp_path / "cells.json")
    said = capsys.readouterr().out.splitlines()
    (claim, *_), rows = json.loads(said[-1]), json.loads((tmp_path / "cells.json").read_text())["rows"]
    assert (
        claim["ours"] > 0
        and claim["other"] > 0
        and (said[0].startswith("absent: NVFLARE")) == ("nvflare" in more)
    )
    assert rows["lines that a user writes"]["fedtune"] < 40 < rows["lines that a user writes"]["plain loop"]
    if "flower" in more:
        spoiled = rows["one client sends NaN"]
        assert spoiled["plain loop"] == "model is NaN, exit code 0"
        assert spoiled["fedtune"] == "goes on without the client"
        assert (
            rows["same weights twice"]["fedtune"]
            == rows["same weights twice"]["fedtune on Flower's engine"]
            == "yes"
        )
        assert rows["killed in round 2, started again"]["fedtune"] == "goes on in round 2, same weights"
        assert rows["killed in round 2, started again"]["plain loop"].startswith("begins anew")


def test_benchmarks_are_recorded(start: Start, tmp_path: Path) -> None:
    start("benchmarks/record.py", "codec", "--tiny", "--out", tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["codec"]["command"] == "python benchmarks/codec.py" and kept["codec"]["claims"]


# --- recordings ---


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model with room for the 128 tokens of the shipped recipes."""
    folder = tiny.llama(tmp_path_factory.mktemp("story"), chat=False)
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {key: 128}))
    return folder


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve speakers who say the same things."""
    path = tmp_path_factory.mktemp("play") / "input.txt"
    path.write_text(
        "\n\n".join(f"SPEAKER {number % 12}:\n{' '.join(tiny.SENTENCES)}." for number in range(60))
    )
    return path


@pytest.fixture
def shakespeare(story: Path, play: Path) -> list[str]:
    changes = {"model.name": story, "data.path": play, "method.train.steps": 1, "data.max_length": 32}
    return ["--seeds", "1", *(f"--set={path}={value}" for path, value in changes.items())]


def rows_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["rows"])


def test_record(shakespeare: list[str], start: Start, tmp_path: Path) -> None:
    start(
        "simulations/record.py",
        "shakespeare",
        "--only",
        "outer Nesterov 1.0 / 0.5",
        *shakespeare,
        "--set=rounds=1",
        "--results",
        tmp_path,
    )
    assert rows_of(tmp_path / "shakespeare.json")["outer Nesterov 1.0 / 0.5"]["1"]["rounds"] == 1


def test_every_row_of_every_table_is_a_recipe(load: Callable[[str], Any]) -> None:
    from fedtune.config import parse_with, read

    record, sfprompt, dolly, tuning = (
        load(f"simulations/{name}.py") for name in ("record", "sfprompt", "dolly", "tuning")
    )
    tables = [
        *record.TABLES.values(),
        ("sfprompt.toml", sfprompt.DIGITS),
        ("clinc150.toml", sfprompt.TEXT),
        ("fedkseed.toml", dolly.ROWS),
    ]
    recipes = [
        read(str(record.HERE / recipe) if recipe else None, sets)
        for recipe, rows in tables
        for sets in rows.values()
    ]
    recipes += [
        parse_with(copy.deepcopy(tuning.BASE), [*sets, "data.path=rows"], "tuning")
        for _, rows in tuning.TABLES.values()
        for sets in rows.values()
    ]
    assert len(recipes) > 100


@pytest.mark.thorough
def test_byzantine(shakespeare: list[str], start: Start, tmp_path: Path) -> None:
    start("simulations/byzantine.py", *shakespeare, "--set=rounds=1", "--results", tmp_path)
    assert set(rows_of(tmp_path / "byzantine.json")) > {"mean", "krum"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "epsilons",
    [["inf"], pytest.param(["inf", "8"], marks=pytest.mark.slow)],  # a minute goes into the search for noise
)
def test_privacy(epsilons: list[str], start: Start, tmp_path: Path) -> None:
    """Two domains of three intents each, whose words the tiny tokenizer knows."""
    words = ["fox", "dog", "song", "piano", "rain", "roof"]
    pairs = {
        split: [[f"the {word} {n % 3}", word] for word in words for n in range(30)]
        for split in ("train", "test")
    }
    (tmp_path / "data_full.json").write_text(json.dumps(pairs))
    (tmp_path / "domains.json").write_text(json.dumps({"one": words[:3], "two": words[3:]}))
    sets = [f"--set=data.path={tmp_path}", f"--set=model.name={tiny.bert(tmp_path / 'bert')}"]
    few = ["--seeds", "1", "--epsilons", *epsilons, "--what", "means", "head", "few"]
    start("simulations/privacy.py", *sets, *few, "--results", tmp_path)
    attacked = rows_of(tmp_path / "privacy-attack.json")
    found = rows_of(tmp_path / "privacy.json") | attacked
    assert set(found) == {
        f"{what}, epsilon {e}"
        for what in ("class means, all rows", "head, all rows", "head, 10 rows a class")
        for e in epsilons
    }
    assert all(row["1"]["epsilon"] is None for name, row in found.items() if name.endswith("inf"))
    assert all(7.5 < row["1"]["epsilon"] <= 8 for name, row in found.items() if name.endswith("8"))
    assert all(0 <= row["1"]["accuracy"] <= 1 for row in found.values())
    assert all(
        0 <= found["head, 10 rows a class, epsilon inf"]["1"][name] <= 1 for name in ("auc", "auc_loss")
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "file"),
    [("one-start", "merging"), pytest.param("strangers", "merging-strangers", marks=pytest.mark.slow)],
)
def test_merging(case: str, file: str, shakespeare: list[str], start: Start, tmp_path: Path) -> None:
    start("simulations/merging.py", "--case", case, *shakespeare, "--results", tmp_path)
    assert set(rows_of(tmp_path / f"{file}.json")) > {"base", "one expert", "mean of products"}


@pytest.mark.thorough
def test_experts(story: Path, start: Start, tmp_path: Path) -> None:
    sentences = [tiny.SENTENCES[n % len(tiny.SENTENCES)] for n in range(40)]
    rows = [{"task": f"task{n % 2:03}", "input": s, "output": str(n)} for n, s in enumerate(sentences)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"model.name": story, "method.train.steps": 1, "rounds": 6, "data.max_length": 48}
    sets = [f"--set={path}={value}" for path, value in few.items()]
    data = ["--data", tmp_path / "rows.jsonl", "--tasks", 2, "--seeds", 1, "--results", tmp_path]
    start("simulations/experts.py", *data, *sets)
    assert set(rows_of(tmp_path / "experts.json")) > {
        "own expert",
        "Arrow, two best",
        "best static merge",
        "alone",
    }


@pytest.mark.thorough
@pytest.mark.parametrize("table", ["gsm8k", "dolly"])
def test_tuning(table: str, story: Path, start: Start, tmp_path: Path) -> None:
    kinds = ("open_qa", "general_qa", "brainstorming", "classification")
    rows = [
        {"question": said, "answer": f"#### {n}", "task": f"task{n % 2}", "input": "fox", "output": "dog"}
        | {"instruction": said, "context": "", "response": f"the dog {n}", "category": kinds[n % 4]}
        for n, said in enumerate(tiny.SENTENCES * 8)
    ]
    for name in ("train", "test", "dolly15k", "general"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"model.name": story, "data.max_length": 64, "method.adapter.last": 1}
    few |= {"method.train.steps": 1, "rounds": 1}
    sets = ["--seeds", 1, *(f"--set={path}={value}" for path, value in few.items())]
    data = ["--data", tmp_path, "--general", tmp_path / "general.jsonl", "--results", tmp_path]
    own = ["S3FT"] if table == "gsm8k" else []
    start("simulations/tuning.py", table, *data, *sets, "--only", "cross entropy", "DFT", *own)
    found = rows_of(tmp_path / f"tuning-{table}.json")
    assert set(found) == {"cross entropy", "base model", "DFT"}  # of S3FT's answers a judge accepts none
    assert found["base model"]["1"]["loss"] != found["DFT"]["1"]["loss"]
    assert all(found[name]["1"]["general_base"] > 0 for name in ("cross entropy", "DFT"))


@pytest.mark.thorough
def test_dolly(story: Path, start: Start, tmp_path: Path) -> None:
    said, kinds = " ".join(tiny.SENTENCES), ("open", "closed", "summarization")
    rows = [
        {"instruction": tiny.SENTENCES[n % 6], "response": f"{n} {said}", "category": kinds[n % 3]}
        for n in range(900)
    ]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = [
        f"--set={change}"
        for change in (
            "rounds=1",
            "partition.clients=3",
            "sampling.count=1",
            "method.steps=1",
            "partition.alpha=100.0",
        )
    ]
    start(
        "simulations/dolly.py",
        "--model",
        story,
        "--data",
        tmp_path / "dolly.jsonl",
        "--seeds",
        1,
        "--out",
        tmp_path / "out.json",
        "--only",
        "hadamard pool (default)",
        "plain torch: FedAvg, SGD",
        *few,
    )
    assert set(rows_of(tmp_path / "out.json")) == {"hadamard pool (default)", "plain torch: FedAvg, SGD"}


@pytest.mark.thorough
def test_sfprompt_on_pictures(start: Start, tmp_path: Path) -> None:
    few = (
        "--set=rounds=1",
        "--set=method.train.epochs=1",
        "--set=data.limit=80",
        "--set=partition.clients=2",
    )
    start(
        "simulations/sfprompt.py",
        tmp_path,
        "--only",
        "head",
        "split k=1 m=5",
        "--seeds",
        1,
        "--epochs",
        1,
        *few,
        "--results",
        tmp_path,
    )
    assert set(rows_of(tmp_path / "sfprompt-digits.json")) == {"head", "split k=1 m=5"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults(start: Start, tmp_path: Path) -> None:
    start("simulations/faults.py", "--kills", 1, "--rounds", 2, "--results", tmp_path)
    assert json.loads((tmp_path / "faults.json").read_text())["mismatches"] == []
