"""Runs of the preset mixlora: what it sets, where experts and gates lie, one model wherever it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import RoundDone
from fedtune.experts.routers import SETTINGS
from fedtune.experts.state import experts_of, gate_of, general_of
from fedtune.runtime import expert_library
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.folder import RunFolder
from tests import small
from tests.methods.gated import same_wherever
from tests.small import HALVES

MIXED: dict[str, Any] = {
    **HALVES,
    "preset": "mixlora",
    "gate": {"rounds": 1, "lr": 0.05},
}
CAUSAL = {"data__task": "causal-lm", "data__max_length": 24, "data__client_test_share": 0.2}


def recipe(model: Path, data: Path, by: dict[str, Any], **changes: Any) -> Any:
    return small.recipe(model, data, method__type="experts", method__experts=by, **{**CAUSAL, **changes})


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("mixlora")
    folder, result, events = small.play(recipe(tiny_llama, small.write_rows(root), MIXED), root)
    told = [event.metrics for event in events if isinstance(event, RoundDone)][-1]
    assert result["left_out"] == 0
    assert told["gate_share/0"] + told["gate_share/1"] == pytest.approx(1) and told["gate_starved"] == 0
    return folder


def test_the_preset_sets_what_the_recipe_does_not_say(tiny_llama: Path, data: Path) -> None:
    found = recipe(tiny_llama, data, MIXED).method.experts
    gate = found.gate
    assert found.within == "feed-forward" and gate.per == "block"
    assert (gate.keep, gate.k, gate.prefix, gate.balance, gate.rounds) == ("topk", 2, False, 0.01, 1)
    other = recipe(tiny_llama, data, MIXED | {"gate": {"rounds": 1, "keep": "dense", "balance": 0.0}})
    assert (other.method.experts.gate.keep, other.method.experts.gate.balance) == ("dense", 0)
    assert Recipe.model_validate_json(other.model_dump_json()) == other


def test_experts_are_of_feed_forward_blocks_and_each_block_has_one_gate(made: RunFolder) -> None:
    shared = load_state(made, 3, "")[0].shared
    for tensors in experts_of(shared).values():
        assert {name.split(".mlp.")[1].split(".")[0] for name in tensors} == {
            "gate_proj",
            "up_proj",
            "down_proj",
        }
    ends = {name.partition("layers.")[2] for name in gate_of(shared)}
    assert ends == {f"{n}.mlp.gate_proj.{part}" for n in (0, 1) for part in ("weight", "bias")}
    assert any("q_proj" in name for name in general_of(shared))


def test_the_runs_model_is_the_same_installed_exported_loaded_and_routed(
    made: RunFolder, tmp_path: Path
) -> None:
    same_wherever(made, tmp_path / "out")
    shutil.copytree(made.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    place = expert_library.library(run)
    config = json.loads((place / "a" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 6 and all(".mlp." in name for name in config["target_modules"])
    assert json.loads((place / SETTINGS).read_text())["per"] == "block"
    assert sum(routed(run, None)["health"]["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("by", "changes", "match"),
    [
        (MIXED | {"gate": {}}, {}, "preset = 'mixlora' without rounds of the gate"),
        (MIXED | {"within": "all"}, {}, "per = 'block' with experts in all layers"),
        (MIXED, {"aggregate": {"rule": "ffa"}}, "within = 'feed-forward' with aggregate.rule = 'ffa'"),
    ],
)
def test_what_the_preset_cannot_do_without_is_refused(
    by: Any, changes: Any, match: str, tiny_llama: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=f"C104.*{match}"):
        recipe(tiny_llama, data, by, **changes)


def test_a_model_whose_blocks_are_not_adapted_is_refused(tiny_llama: Path, data: Path) -> None:
    attention = recipe(tiny_llama, data, MIXED, method__adapter={"kind": "lora", "targets": ["q_proj"]})
    with pytest.raises(FedtuneError, match=r"M306: .*with LoRA on no feed-forward layer"):
        small.workspace_of(attention)


def test_check_counts_a_gate_for_each_block(tiny_llama: Path, data: Path) -> None:
    """Two blocks of width 32, two experts and a bias each: 4 x 2 x 2 x 33 bytes."""
    (line,) = (line for line in rows(check(recipe(tiny_llama, data, MIXED))) if "train a gate alone" in line)
    assert "up to 528 bytes up" in line
