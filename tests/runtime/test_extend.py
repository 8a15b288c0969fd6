"""Going on: more rounds, another run's adapter as a start, scores and exports of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedtune.cli import main
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.runtime.extend import extend
from fedtune.runtime.finished import evaluate_file, evaluate_run, export_run
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.run import run
from tests import small
from tests.marks import mostly_thorough

WALK = {
    "type": "fedkseed",
    "size": 256,
    "steps": 6,
    "batch": 4,
    "lr": 1e-3,
    "estimator": "spsa",
    "refresh": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fedpeft": {},
    "fedpeft, both ways": {
        "chain": [{"step": "sign", "error_feedback": True}],
        "downlink": {"step": "delta"},
        "sampling": {"count": 3},
    },
    "fedpeft, server adam": {"method__server": {"optimizer": "adam", "lr": 0.01}},
    "fedkseed": {"method": WALK},
    "sfprompt": {"method": {"type": "sfprompt", "prompts": 3, "train": {"lr": 0.01, "steps": 2, "batch": 4}}},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small.write_rows(tmp_path)


def played(recipe: Recipe, root: Path) -> tuple[RunFolder, dict[str, Any]]:
    folder, result, _ = small.play(recipe, root)
    return folder, result


@pytest.mark.parametrize("name", mostly_thorough(VARIANTS, ["fedkseed"]))
def test_a_run_that_is_extended_ends_with_the_bytes_of_a_long_one(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    compared = {"evaluate": {"local": False, "centralised": True, "base": True}}
    folder, short = played(
        small.recipe(tiny_bert, data, rounds=2, **compared, **VARIANTS[name]), tmp_path / "short"
    )
    result = run(extend(folder, 4), folder, lambda event: None)
    _, long = played(small.recipe(tiny_bert, data, rounds=4, **compared, **VARIANTS[name]), tmp_path / "long")
    assert result["state_sha256"] == long["state_sha256"] != short["state_sha256"]
    assert all(result[key] == long[key] for key in ("base", "federated", "centralised", "rounds"))
    again = extend(folder, 4)
    assert (
        again.rounds == 4 and run(again, folder, lambda event: None)["state_sha256"] == long["state_sha256"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__train": {"schedule": "cosine"}}, "schedule = 'cosine'"),
        ({"method__train": {"warmup": 0.1}}, "warmup"),
        ({"aggregate": {"rule": "fedsa"}}, "rule = 'fedsa'"),
    ],
)
def test_what_depends_on_the_number_of_rounds_is_refused(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, _ = played(small.recipe(tiny_bert, data, rounds=1, **changes), tmp_path)
    with pytest.raises(FedtuneError, match=rf"C104.*{words}"):
        extend(folder, 3)
    with pytest.raises(FedtuneError, match=r"C104.*--rounds 0 for a run of 1"):
        extend(folder, 0)
    assert recipe_of(folder).rounds == 1 and (folder.path / "result.json").exists()


@pytest.mark.parametrize("kind", mostly_thorough(["lora", "bias", "full"], ["lora"]))
def test_a_run_starts_from_another_runs_adapter(
    kind: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    adapter = {"method__adapter": {"kind": kind, **({"rank": 2} if kind == "lora" else {})}}
    first, result = played(small.recipe(tiny_bert, data, **adapter), tmp_path / "first")
    recipe = small.recipe(tiny_bert, data, evaluate__base=True, method__start_from=str(first.path), **adapter)
    _, after = played(recipe, tmp_path / "second")
    assert (
        after["base"] == pytest.approx(result["federated"])
        and after["state_sha256"] != result["state_sha256"]
    )
    with pytest.raises(FedtuneError, match=r"M304.*no adapter in"):
        played(
            small.recipe(tiny_bert, data, method__start_from=str(tmp_path / "nowhere"), **adapter),
            tmp_path / "third",
        )


def test_a_stock_adapter_is_a_start_if_its_scale_is_the_recipes(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    import peft
    import transformers

    net = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    settings = peft.LoraConfig(
        r=2, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False
    )
    peft.get_peft_model(net, settings).save_pretrained(tmp_path / "stock")
    adapter = {
        "method__adapter": {"kind": "lora", "rank": 2, "alpha": 16.0},
        "method__start_from": str(tmp_path / "stock"),
    }
    folder, _ = played(
        small.recipe(tiny_bert, data, rounds=1, method__train={"lr": 1e-9, "steps": 1}, **adapter),
        tmp_path / "run",
    )
    want, found = (
        load_file(str(place / "adapter_model.safetensors")) for place in (tmp_path / "stock", folder.adapter)
    )
    assert want.keys() == found.keys() and all(abs(want[name] - found[name]).max() < 1e-6 for name in want)
    with pytest.raises(FedtuneError, match=r"M304.*lora_alpha = 16"):
        played(
            small.recipe(
                tiny_bert, data, **{**adapter, "method__adapter": {"kind": "lora", "rank": 2, "alpha": 4.0}}
            ),
            tmp_path / "other",
        )


def test_scores_and_exports_of_a_finished_run(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = played(small.recipe(tiny_bert, data), tmp_path / "run")
    assert evaluate_run(folder)["value"] == result["federated"]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in small.rows(30)))
    with data.open("a") as file:  # the file has grown: a test set drawn from it would hold trained rows
        file.write(json.dumps(small.rows(1)[0]) + "\n")
    with pytest.raises(FedtuneError, match=r"R406.*data that has changed since the run began"):
        evaluate_run(folder)
    data.unlink()
    found = evaluate_file(folder, str(other))
    assert found["rows"] == 30 and 0 <= found["value"] <= 1
    export_run(folder, "adapter", tmp_path / "adapter")  # needs no data
    assert load_file(str(tmp_path / "adapter" / "adapter_model.safetensors")).keys()
    assert (
        main(["eval", str(folder.path), "--data", str(tmp_path / "gone.jsonl")]) == 2
        and "D201" in capsys.readouterr().err
    )
    assert (
        main(["export", str(folder.path), "--rank", "0", "--to", str(tmp_path / "x")]) == 2
        and "--rank 0" in capsys.readouterr().err
    )


def test_the_config_of_an_older_run_is_read(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    folder, _ = played(small.recipe(tiny_bert, data), tmp_path)
    config = json.loads((folder.path / "config.json").read_text())
    config["aggregate"] |= {
        "extra": 32,
        "by": "slices",
        "lam": 0.01,
        "trim": 0.2,
        "faulty": 1,
        "chosen": 0,
        "bound": 0.0,
    }
    config["method"]["server"] |= {"lr": 1.0, "momentum": 0.0, "nesterov": False}
    (folder.path / "config.json").write_text(json.dumps(config))
    assert recipe_of(folder).aggregate.rule == "mean"
    config["surprise"] = 1
    (folder.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedtuneError, match="R402"):
        recipe_of(folder)
