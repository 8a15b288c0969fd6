"""Runs whose experts live in some blocks only: state, messages, library, export, what is refused."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedtune.errors import FedtuneError
from fedtune.events import RoundDone
from fedtune.experts.routers import LIVING, SETTINGS
from fedtune.experts.state import experts_of, gate_of, general_of
from fedtune.runtime import expert_library
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.expert_changes import export
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder
from fedtune.types import Round
from tests import small
from tests.methods.gated import same_wherever

FOUR: dict[str, Any] = {"by": "given", "groups": ["a", "b", "c", "d"], "warm_up": 1, "min_clients": 2}
SHAPED = FOUR | {"shape": "triangle", "gate": {"rounds": 1, "lr": 0.05}}
LIVES = {"a": {0, 1}, "b": {0}, "c": {0}, "d": {1}}  # of 3 and 2 in two blocks, in turns
EIGHT = {"partition": {"by": "iid", "clients": 8}}
CAUSAL = {"data__task": "causal-lm", "data__max_length": 24, "data__client_test_share": 0.2}


def recipe(model: Path, data: Path, by: dict[str, Any], **changes: Any) -> Any:
    return small.recipe(
        model, data, method__type="experts", method__experts=by, **{**EIGHT, **CAUSAL, **changes}
    )


@pytest.fixture(scope="module")
def played(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Any]]:
    root = tmp_path_factory.mktemp("shaped")
    folder, result, events = small.play(recipe(tiny_llama, small.write_rows(root), SHAPED), root)
    assert result["left_out"] == 0
    return folder, [event.metrics for event in events if isinstance(event, RoundDone)]


@pytest.fixture(scope="module")
def made(played: tuple[RunFolder, list[Any]]) -> RunFolder:
    return played[0]


def blocks_of(names: Any) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


def test_experts_have_pairs_where_they_live_and_the_gate_a_row_for_each_that_does(made: RunFolder) -> None:
    state = load_state(made, 3, "")[0]
    found = experts_of(state.shared)
    assert {name: blocks_of(tensors) for name, tensors in found.items()} == LIVES
    general = general_of(state.shared)
    for name, tensors in found.items():
        assert all(tensors[tensor].shape == general[tensor].shape for tensor in tensors), name
        assert any(value.any() for tensor, value in tensors.items() if "lora_B" in tensor)
    rows_of = {len(value) for name, value in gate_of(state.shared).items() if ".0." in name}
    assert rows_of == {3} and {len(v) for n, v in gate_of(state.shared).items() if ".1." in n} == {2}


def test_the_general_expert_is_that_of_fedpeft_to_the_bit(made: RunFolder, tmp_path: Path) -> None:
    plain = small.recipe(
        Path(installed(made, "last")[0].recipe.model.name),
        made.path.parent / "rows.jsonl",
        rounds=2,
        **EIGHT,
        **CAUSAL,
    )  # the gate's round leaves it as it is
    folder = small.play(plain, tmp_path)[0]
    want = load_state(folder, 2, "")[0].shared
    got = general_of(load_state(made, 3, "")[0].shared)
    assert want.keys() == got.keys() and all((want[name] == got[name]).all() for name in want)


def test_events_measure_an_expert_by_the_blocks_that_it_has(played: Any) -> None:
    told = played[1][-1]
    shares = [told[f"gate_share/{number}"] for number in range(4)]
    assert sum(shares) == pytest.approx(1) and told["gate_starved"] == 0
    assert max(shares[1:3]) <= 0.5  # b and c have one block of two


def test_the_runs_model_is_the_same_installed_exported_and_loaded(made: RunFolder, tmp_path: Path) -> None:
    same_wherever(made, tmp_path / "out")


def test_the_library_holds_adapters_of_the_layers_where_each_lives(made: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(made.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    place, name = expert_library.library(run), installed(made, "last")[0].recipe.model.name
    for expert, blocks in LIVES.items():
        config = json.loads((place / expert / "adapter_config.json").read_text())
        net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), place / expert)
        trained = [key for key, _ in net.named_parameters() if "lora_A" in key]
        assert blocks_of(trained) == blocks
        if expert != "a":
            assert blocks_of(config["target_modules"]) == blocks
        export(run, [expert], tmp_path / expert)  # on what is beneath it
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), tmp_path / expert)
        assert blocks_of(key for key, _ in whole.named_parameters() if "lora_A" in key) == {0, 1}
    about = json.loads((place / SETTINGS).read_text())
    assert {tuple(here) for here in about[LIVING].values()} == {("a", "b", "c"), ("a", "d")}
    by_gate = routed(run, None)
    assert sum(by_gate["health"]["shares"].values()) == pytest.approx(1)
    before = by_gate["losses"]
    expert_library.remove(run, "b", datetime(2026, 1, 2, tzinfo=UTC))
    after = routed(run, None)
    assert after["losses"].keys() == before.keys() and set(after["health"]["shares"]) == {"a", "c", "d"}


def test_clients_take_the_experts_of_fewer_groups_and_no_others(tiny_llama: Path, data: Path) -> None:
    by = {"by": "clusters", "most": 4, "warm_up": 1, "min_clients": 2, "shape": "inverted"}
    workspace, link = small.workspace_of(recipe(tiny_llama, data, by))
    verb = link.method.verbs["specialise"]
    now = Round(2, 3, (0,))
    assert verb.otherwise is not None
    schemas = [verb.given(workspace.tunable, 0, now), *verb.otherwise(workspace.tunable, 0, now)]
    assert {frozenset(blocks_of(n for n in one.shapes if n.startswith("expert/"))) for one in schemas} == {
        frozenset({0}),
        frozenset({1}),
        frozenset({0, 1}),
    }
    for one in schemas:
        assert verb.answer(one, now).shapes.keys() == {n for n in one.shapes if n.startswith("expert/")}


@pytest.mark.parametrize(
    ("by", "match"),
    [
        ({"by": "clients", "shape": "triangle"}, "an owner's expert comes with all its layers"),
        (FOUR | {"shape": "diamond", "rank": "auto"}, "equal ranks"),
        ({"by": "clusters", "shape": "hourglass", "recluster_every": 2}, "groups that are found once"),
    ],
)
def test_what_a_shape_cannot_stand_beside_is_refused(
    by: Any, match: str, tiny_llama: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=f"C104.*{match}"):
        recipe(tiny_llama, data, by)


def test_one_adapted_block_has_no_shape(tiny_llama: Path, data: Path) -> None:
    one = recipe(tiny_llama, data, SHAPED, method__adapter={"kind": "lora", "rank": 2, "last": 1})
    with pytest.raises(
        FedtuneError, match=r"M306: found method\.experts\.shape = 'triangle' with LoRA in fewer"
    ):
        small.workspace_of(one)


def test_check_counts_the_pairs_that_live(tiny_llama: Path, data: Path) -> None:
    whole, shaped = (
        [line for line in rows(check(recipe(tiny_llama, data, by))) if "train a gate alone" in line]
        for by in (SHAPED | {"shape": "whole"}, SHAPED)
    )
    numbers = [
        [int(word.replace(",", "")) for word in line[0].split() if word.replace(",", "").isdigit()][1:3]
        for line in (whole, shaped)
    ]
    assert numbers[1][0] * 8 == numbers[0][0] * 5  # 5 of 8 rows of a gate whose layers are alike in blocks
    assert numbers[1][1] < numbers[0][1]
