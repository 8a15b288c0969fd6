"""A gate that a run's clients train: what stands still, where it starts, who is told what, and where it is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.events import RoundDone
from fedtune.experts.routers import GATES, SETTINGS, loaded
from fedtune.experts.shapes import Where
from fedtune.experts.state import experts_of, gate_of, general_of, inputs_of
from fedtune.experts.trained import start
from fedtune.model.stream import Wish
from fedtune.runtime import expert_library
from fedtune.runtime.chat import talker
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.finished import export_run
from fedtune.runtime.folder import RunFolder
from fedtune.schema import Schema, digest
from fedtune.types import Round
from tests import small
from tests.methods.gated import IDS, answer, same_wherever
from tests.small import HALVES

GATE = {"rounds": 2, "lr": 0.05}
CAUSAL = {"data__task": "causal-lm", "data__max_length": 24, "data__client_test_share": 0.2}


def recipe(model: Path, data: Path, by: dict[str, Any], **changes: Any) -> Any:
    return small.recipe(model, data, method__type="experts", method__experts=by, **changes)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("gate")
    by = HALVES | {"gate": GATE | {"null": True, "balance": 0.01}}
    return small.play(recipe(tiny_llama, small.write_rows(root), by, rounds=4, **CAUSAL), root)[0]


@pytest.fixture
def run(made: RunFolder, tmp_path: Path) -> Iterator[RunFolder]:
    shutil.copytree(made.path, tmp_path / "run")
    yield RunFolder(tmp_path / "run")


def state_after(folder: RunFolder, number: int) -> Any:
    return load_state(folder, number, "")[0]


def test_the_gate_alone_moves_and_starts_from_the_groups_mean_inputs(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    without = small.play(recipe(tiny_bert, data, HALVES, rounds=2), tmp_path / "without")[0]
    by = HALVES | {"gate": {"rounds": 1, "lr": 1e-9}}
    folder, result, _ = small.play(recipe(tiny_bert, data, by), tmp_path / "with")
    before, after = state_after(without, 2), state_after(folder, 3)
    assert digest(general_of(after.shared)) == digest(general_of(before.shared))
    for name, tensors in experts_of(before.shared).items():
        assert digest(experts_of(after.shared)[name]) == digest(tensors)
    inputs = inputs_of(after.kept)
    sizes = {layer: (value.shape[1], 0) for layer, value in inputs["a"].items()}
    where = Where(dict.fromkeys(sizes, (0, 1)), tuple(sizes))
    first = start(["a", "b"], inputs, sizes, where, False)
    for name, value in gate_of(after.shared).items():
        np.testing.assert_allclose(value, first[name], atol=1e-5)
    assert result["left_out"] == 0 and set(gate_of(after.shared)) == set(first)


def test_with_nothing_to_choose_from_a_run_is_the_run_without_a_gate(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    for groups in (["a"], [""]):
        by = HALVES | {"groups": groups}
        plain = small.play(recipe(tiny_bert, data, by), tmp_path / f"plain{groups}")[1]
        gated = small.play(
            recipe(tiny_bert, data, by | {"gate": GATE | {"rounds": 1}}), tmp_path / f"g{groups}"
        )[1]
        assert gated["state_sha256"] == plain["state_sha256"]


def test_training_lowers_the_loss_and_the_events_tell_who_is_asked(tiny_bert: Path, tmp_path: Path) -> None:
    """Sites of two kinds call their rows otherwise: whose row it is decides which expert is right."""
    labels, path = sorted(small.WORDS), tmp_path / "rows.jsonl"
    lines = []
    for number, row in enumerate(small.rows(160)):
        site = number % 4
        name = labels[(labels.index(row["label"]) + site % 2) % 3]
        text = f"{'he' if site % 2 else 'she'} {row['text']}"
        lines.append(json.dumps({"text": text, "label": name, "site": f"site-{site}"}) + "\n")
    path.write_text("".join(lines))
    changes = {
        "partition": {"by": "column", "column": "site", "clients": 4},
        "rounds": 6,
        "method__train": {"lr": 0.02, "steps": 4, "batch": 8},
    }
    by = HALVES | {"gate": {"rounds": 3, "keep": "dense", "lr": 0.05}}
    events = small.play(recipe(tiny_bert, path, by, **changes), tmp_path)[2]
    told = [event.metrics for event in events if isinstance(event, RoundDone)]
    assert [("gate_loss" in one, "loss" in one) for one in told] == [(False, True)] * 3 + [(True, False)] * 3
    assert told[-1]["gate_loss"] < told[3]["gate_loss"]
    last = told[-1]
    assert last["gate_share/0"] + last["gate_share/1"] == pytest.approx(1)
    assert 0 <= last["gate_entropy"] <= np.log(2) and last["gate_collapsed"] == last["gate_starved"] == 0


def test_clients_refuse_what_is_no_gate_of_this_run(tiny_bert: Path, data: Path) -> None:
    by = HALVES | {"groups": ["a", "b", "c"], "gate": GATE}
    workspace, link = small.workspace_of(recipe(tiny_bert, data, by, rounds=4))
    verb = link.method.verbs["gate"]
    schemas = [verb.given(workspace.tunable, 0, Round(4, 3, (0,)))]
    assert verb.otherwise is not None
    schemas += verb.otherwise(workspace.tunable, 0, Round(4, 3, (0,)))
    assert [schema.shapes["experts/ranks"] for schema in schemas] == [(3,), (1,), (2,)]
    given = {name: np.zeros(shape, np.float32) for name, shape in schemas[2].entries}
    for ranks in ([2, 3], [4, 0], [1.5, 2.5]):
        with pytest.raises(FedtuneError, match="W603"):
            verb.work(
                workspace.client_with(0, {}), given | {"experts/ranks": np.float32(ranks)}, Round(4, 3, (0,))
            )
    assert verb.answer(Schema.of(given), Round(4, 3, (0,))).shapes.keys() == {
        name for name in given if name.startswith("gate/")
    }


def test_the_model_of_the_run_is_all_experts_behind_the_gate(made: RunFolder, tmp_path: Path) -> None:
    """Installed, exported, loaded, from the library: one answer; generating with a cache and without agree."""
    workspace = same_wherever(made, tmp_path / "out")
    assert workspace.tunable.routed is not None and workspace.tunable.routed.names == ("a", "b")
    general = AutoModelForCausalLM.from_pretrained(workspace.recipe.model.name)
    assert not torch.allclose(answer(workspace.tunable.net), answer(general), atol=1e-3)
    said = talker(made.path, "last").answer(IDS[0].tolist(), Wish(tokens=6))
    list(said.pieces)
    assert said.said
    with pytest.raises(FedtuneError, match="M306: found --as merged for a run with a gate"):
        export_run(made, "merged", tmp_path / "merged", which="last")


def test_the_runs_model_is_scored_against_an_expert_that_it_leaves_out(made: RunFolder) -> None:
    own, told = (fedtune.evaluate(made.path, round="last", steer=steer) for steer in ("", "self"))
    assert (
        told["steer"] == {"model": "self", "weight": 0.5} and told["clients"].keys() == own["clients"].keys()
    )
    assert 1e-4 < abs(told["loss"] - own["loss"]) < 1
    still = fedtune.evaluate(made.path, round="last", steer="self", steer_weight=0)
    assert still["loss"] == own["loss"]


def test_the_library_keeps_the_gate_and_routes_by_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    place = expert_library.library(run)
    about = json.loads((place / SETTINGS).read_text())
    assert about["experts"] == ["a", "b"] and about["null"] and about["gate"] == "trained"
    assert len(about["losses"]) == 2 and set(about["shares"]) == {"a", "b", "nobody"}
    assert main(["experts", "list", str(run.path)]) == 0
    assert "a trained gate over a, b: topk" in capsys.readouterr().out
    assert main(["experts", "route", str(run.path)]) == 0
    assert "nobody" in capsys.readouterr().out
    by_gate = routed(run, None)
    assert sum(by_gate["health"]["shares"].values()) == pytest.approx(1)
    before = load_file(place / GATES)
    expert_library.remove(run, "b", datetime(2026, 1, 2, tzinfo=UTC))
    assert json.loads((place / SETTINGS).read_text())["experts"] == ["a"]
    for name, value in load_file(place / GATES).items():
        np.testing.assert_array_equal(value, np.delete(before[name], 1, 0))
    assert loaded(place, {"a": load_file(place / "a" / "adapter_model.safetensors")}, {}).names == ("a",)
    assert set(routed(run, None)["health"]["shares"]) == {"a", "nobody"}
    expert_library.remove(run, "a", datetime(2026, 1, 3, tzinfo=UTC))
    assert not (place / GATES).exists()


@pytest.mark.parametrize(
    ("by", "changes", "match"),
    [
        ({"by": "clients", "gate": GATE}, {}, "by = 'clients'"),
        (HALVES | {"inputs": False, "gate": GATE}, {}, "mean inputs"),
        (HALVES | {"gate": GATE}, {"aggregate": {"rule": "ffa"}}, "both factors"),
        (HALVES | {"gate": GATE | {"rounds": 3}}, {}, "3 of 4 rounds, after 1 of warm-up"),
        ({"by": "clusters", "most": 99, "gate": GATE | {"rounds": 1}}, {}, "99 experts"),
        (HALVES | {"gate": GATE}, {"method__train": {"private": {"max_grad_norm": 1.0}}}, "private"),
        (HALVES | {"gate": GATE}, {"method__train": {"objective": {"loss": "asft"}}, **CAUSAL}, "asft"),
    ],
)
def test_what_a_gate_cannot_stand_beside_is_refused(
    by: Any, changes: Any, match: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=f"C104.*{match}"):
        recipe(tiny_bert, data, by, rounds=4, **changes)


def test_check_says_what_the_gate_takes_and_who_is_given_all_experts(tiny_bert: Path, data: Path) -> None:
    plain, gated = (check(recipe(tiny_bert, data, HALVES | more, rounds=4)) for more in ({}, {"gate": GATE}))
    said = "\n".join(rows(gated))
    assert "verb 'gate': sees each client's answer as it passes, uses the sum only" in said
    assert "the last 2 rounds train a gate alone" in said and "of other groups all experts" in said
    assert abs(gated.up_bytes - plain.up_bytes) < 300  # names of figures; the gate's own bytes are told apart
