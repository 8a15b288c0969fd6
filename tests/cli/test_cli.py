"""The command line as a user meets it: quick, one sentence for a mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.cli import main
from tests import small
from tests.waiting import PATIENCE

DATA = "id,text,label\n1,the red fox runs,animals\n2,a slow song on the piano,music\n"


def fedtune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedtune", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def children_seconds() -> float:
    """CPU time of all programs that this process has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_loads_no_torch() -> None:
    """Seconds of its own work: what a busy machine makes of them says nothing about us."""
    seconds = []
    for _ in range(3):
        began = children_seconds()
        done = fedtune("--help")
        seconds.append(children_seconds() - began)
    assert done.returncode == 0 and "simulate" in done.stdout
    assert min(seconds) < 0.5
    probe = (
        "import sys, fedtune.cli as c; c.main([]); print('HEAVY', [m for m in ('torch', 'flwr', "
        "'transformers', 'pydantic') if m in sys.modules])"
    )
    assert (
        "HEAVY []"
        in subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    )


def test_reading_a_recipe_loads_no_torch() -> None:
    probe = "import sys, fedtune.config, fedtune.runtime.check; fedtune.config.read(None); "
    probe += "print([m for m in ('torch', 'flwr', 'transformers', 'peft') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.fixture
def recipe(tiny_bert: Path, tmp_path: Path) -> Path:
    import tomli_w

    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(small.tree(tiny_bert, small.write_rows(tmp_path))))
    return path


def test_a_run_leaves_a_whole_folder(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    turned_on = (
        "evaluate.base=true",
        "evaluate.local=true",
        "evaluate.centralised=true",
        "evaluate.clients=true",
    )
    assert main(["simulate", str(recipe), "--runs", str(runs), *(f"--set={s}" for s in turned_on)]) == 0
    folder = runs / "mine"
    result = json.loads((folder / "result.json").read_text())
    for key in ("base", "local", "federated", "centralised"):
        assert 0 <= result[key] <= 1
    assert (
        result["metric"] == "accuracy"
        and result["rounds"] == 3
        and result["clients"] == 4
        and result["seconds"] > 0
    )
    assert (
        set(result["phases"]["clients_metric"]) == {f"client-{n}" for n in range(4)}
        or len(result["phases"]["clients_metric"]) == 4
    )
    assert (folder / "adapter" / "adapter_config.json").exists() and (
        folder / "adapter" / "README.md"
    ).exists()
    said = capsys.readouterr().out
    assert "local only" in said and "centralised" in said and str(folder / "adapter") in said

    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "</html>" in page and "federated" in page

    before = (folder / "result.json").read_bytes()
    assert main(["resume", str(folder)]) == 0  # a finished run says its result again
    assert (folder / "result.json").read_bytes() == before

    capsys.readouterr()
    assert main(["eval", str(folder)]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["value"] == result["federated"] and len(scored["clients"]) == 4


def test_check_says_what_would_happen_and_makes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe)]) == 0
    said = capsys.readouterr().out
    for word in (
        "trained",
        "clients",
        "bytes",
        "memory",
        "sees each client's answer as it passes",
        "held out",
    ):
        assert word in said
    assert "up 32.000, down 32.000" in said and not (tmp_path / "runs").exists()
    assert (
        main(
            [
                "check",
                str(recipe),
                "--set",
                "chain=[{step='sign'}]",
                "--set",
                "downlink.step=int8",
                "--resolved",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "through sign" in said and "up 1." in said and "down 8.25" in said and 'step = "sign"' in said


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        (["rounds=0"], "C102", "rounds"),
        (["method.adapter.rank=0"], "C102", "method.adapter.rank"),
        (["nonsense=1"], "C101", "nonsense"),
        (["data.path=nowhere.jsonl"], "D201", "nowhere.jsonl"),
        (["data.text=body"], "D204", "body"),
        (["data.labels=['animals', 'music']"], "D206", "weather"),
        (["method.adapter.targets=['nolayer']"], "M302", "nolayer"),
        (["model.name=no/such/model"], "M301", "no/such/model"),
        (["partition.clients=200"], "D205", "client"),
        (["model.device=gpu"], "M301", "gpu"),
        (["method.train.lr=inf"], "C102", "lr"),
        (["data.labels=['animals', 'music', 'weather', 'music']"], "D206", "music"),
        (["data.stride=99"], "C104", "data.stride"),
        (["method.server.optimizer=adam", "method.server.nesterov=true"], "C104", "nesterov"),
        (["data.overlong=refuse", "data.max_length=4"], "D207", "4"),
    ],
)
def test_a_mistake_is_one_sentence_with_exit_code_2_and_nothing_on_disk(
    changes: list[str], code: str, word: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main(["simulate", str(recipe), "--runs", str(runs), *(f"--set={c}" for c in changes)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"fedtune: {code}: found ") and word in said and "\n" not in said
    assert not runs.exists() or not list(runs.iterdir())  # the name is free for the corrected recipe


def test_an_existing_folder_is_left_alone(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    assert main(["simulate", str(recipe), "--runs", str(tmp_path / "runs"), "--set", "name=taken"]) == 2
    assert "R401" in capsys.readouterr().err and not list((tmp_path / "runs" / "taken").iterdir())


def test_an_unwritable_place_is_a_sentence(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["simulate", str(recipe), "--runs", str(tmp_path / "file")]) == 2
    assert "R404" in capsys.readouterr().err


def test_a_damaged_state_and_a_changed_recipe_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main(["simulate", str(recipe), "--runs", str(runs)]) == 0
    state = runs / "mine" / "state" / "round-0003.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-8])
    assert (
        main(["resume", str(runs / "mine")])
        == 2
        == main(["export", str(runs / "mine"), "--to", str(tmp_path / "out")])
    )
    assert capsys.readouterr().err.count("R403") == 2 and not (tmp_path / "out").exists()
    state.write_bytes(whole)
    config = json.loads((runs / "mine" / "config.json").read_text())
    (runs / "mine" / "config.json").write_text(json.dumps(config | {"rounds": 4}))
    assert main(["resume", str(runs / "mine")]) == 2
    assert "R406" in capsys.readouterr().err


def test_a_run_goes_on_from_another_folder_but_not_with_other_data(
    recipe: Path,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, tmp_path / "bert")
    relative = ["--set", "data.path=rows.jsonl", "--set", "model.name=bert"]
    assert (
        main(
            ["simulate", "mine.toml", "--set", "name=first", "--set", "rounds=1", *relative, "--runs", "runs"]
        )
        == 0
    )
    started = [*relative, "--set", "method.start_from=runs/first", "--set", "data.client_test_share=0.2"]
    assert main(["simulate", "mine.toml", "--set", "name=whole", *started, "--runs", "runs"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("fedtune.runtime.run.finish", lambda work: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["simulate", "mine.toml", *started, "--runs", "runs"]) == 130
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows[: len(rows) // 2].rpartition("\n")[0] + "\n")
    assert main(["resume", "../runs/mine"]) == 2 and "R406" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(rows)
    assert main(["resume", "../runs/mine"]) == 0
    results = [
        json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("mine", "whole")
    ]
    assert results[0]["state_sha256"] == results[1]["state_sha256"]
    capsys.readouterr()
    assert main(["eval", "../runs/mine"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == results[0]["federated"]
    assert main(["export", "../runs/mine", "--to", "out"]) == 0
    assert (
        json.loads((here / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "bert"
    )  # as the recipe calls it
    assert (
        main(
            ["merge", "../runs/mine", "out", "--base", "../bert", "--eval", "../runs/mine", "--to", "merged"]
        )
        == 0
    )
    assert Path.cwd() == here and (here / "merged" / "adapter_config.json").exists()


def test_check_finds_texts_beyond_the_context(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe), "--set", "data.max_length=4096"]) == 2
    assert "D207" in capsys.readouterr().err
    assert main(["check", str(recipe), "--set", "method.adapter.last=9"]) == 2
    assert "M302" in capsys.readouterr().err


def test_exports_load_in_stock_libraries_with_equal_logits(
    recipe: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    runs, labels = tmp_path / "runs", sorted(small.WORDS)
    assert main(["simulate", str(recipe), "--runs", str(runs)]) == 0
    for form in ("adapter", "merged"):
        assert main(["export", str(runs / "mine"), "--as", form, "--to", str(tmp_path / form)]) == 0
    assert main(["export", str(runs / "mine"), "--to", str(tmp_path / "merged")]) == 2  # never over something
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        "the red fox runs over the roof", return_tensors="pt"
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=len(labels))
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**words).logits, adapted(**words).logits, rtol=1e-4, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(labels))
    assert "recipe SHA-256" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_of_another_base_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests import tiny

    runs = tmp_path / "runs"
    assert main(["simulate", str(recipe), "--runs", str(runs)]) == 0
    import torch

    torch.manual_seed(1)
    other = tiny.bert(tmp_path / "other", dropout=0.1)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(bytes(content))
    config = json.loads((runs / "mine" / "config.json").read_text())
    config["model"]["name"] = str(other)
    (runs / "mine" / "config.json").write_text(json.dumps(config))
    assert main(["export", str(runs / "mine"), "--to", str(tmp_path / "out")]) == 2
    assert "M304" in capsys.readouterr().err


def test_a_defect_is_no_traceback_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedtune import config

    monkeypatch.setattr(config, "read", lambda *a: 1 / 0)
    assert main(["check"]) == 70
    said = capsys.readouterr().err
    assert "X900" in said and "Traceback" not in said and "FEDTUNE_DEBUG=1" in said


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


def test_a_home_folder_is_meant_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in --keys=~/keys, which a shell leaves alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["keys", "init", "--federation", "demo", "--host", "127.0.0.1", "--keys=~/keys"]) == 0
    assert (
        main(["keys", "issue", "site-a", "--keys=~/keys"]) == 0
        and (tmp_path / "keys" / "clients" / "site-a").is_dir()
    )
    assert main(["eval", "~/no-run"]) == 2 and str(tmp_path / "no-run") in capsys.readouterr().err
