"""A run's library of experts: what is on disk, what owners bring and take away, what is scored and handed on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.experts.cards import GENERAL, cards, library_sha256, write
from fedtune.experts.routers import Routing
from fedtune.experts.state import experts_of, general_of
from fedtune.model.inputs import input_moments
from fedtune.model.lora_files import read_expert
from fedtune.runtime import expert_changes, expert_library, expert_scores
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.merge import Asked
from fedtune.trust.authority import create
from fedtune.trust.certificates import utc_now
from fedtune.trust.signed import Signed, check
from tests import small

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GROUPS = {"by": "given", "groups": ["a", "b"], "warm_up": 1, "min_clients": 2}


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("experts")
    recipe = small.recipe(
        tiny_llama,
        small.write_rows(root),
        method__type="experts",
        method__experts=GROUPS,
        data__task="causal-lm",
        data__max_length=24,
        data__client_test_share=0.2,
    )
    return small.play(recipe, root)[0]


@pytest.fixture
def run(made: RunFolder, tmp_path: Path) -> Iterator[RunFolder]:
    """A copy to change."""
    shutil.copytree(made.path, tmp_path / "run")
    yield RunFolder(tmp_path / "run")


@pytest.fixture(scope="module")
def sovereign(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that stock peft made."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    net = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for name, value in net.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.02)
    place = tmp_path_factory.mktemp("owner") / "adapter"
    net.save_pretrained(place)
    return place


IDS = torch.arange(3, 15)[None]


def logits(model: Path, adapter: Path) -> torch.Tensor:
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    with torch.no_grad():
        result: torch.Tensor = net(input_ids=IDS).logits
    return result


def test_an_expert_on_disk_is_a_stock_adapter_with_a_card(made: RunFolder, tiny_llama: Path) -> None:
    place = expert_library.library(made)
    found = cards(place)
    state, _ = load_state(made, 3, "")
    assert list(found) == [GENERAL, "a", "b"]
    assert {card.beneath for name, card in found.items() if name != GENERAL} == {GENERAL}
    for name, card in found.items():
        assert (
            card.sha256
            == hashlib.sha256((place / name / "adapter_model.safetensors").read_bytes()).hexdigest()
        )
        assert card.rank == 2 and card.rounds == len(card.losses) == (3 if name == GENERAL else 2)
        assert card.owners == (4 if name == GENERAL else 2)
        assert 0 < card.weight <= 120  # rows, not the tokens of mean inputs
        assert card.losses[-1] > card.losses[0] / 2  # of the mean inputs' answers, which tell no loss
        wanted = general_of(state.shared) if name == GENERAL else experts_of(state.shared)[name]
        expert = read_expert(place / name)
        scale = 16.0 / 2
        for tensor, value in wanted.items():
            times = scale if ".lora_B." in tensor else 1.0
            np.testing.assert_allclose(expert.tensors[tensor], times * value, rtol=1e-6)
    assert torch.isfinite(logits(tiny_llama, place / "a")).all()


def test_an_export_is_the_general_expert_and_the_other_one_added_up(
    made: RunFolder, tiny_llama: Path, tmp_path: Path
) -> None:
    place = expert_library.library(made)
    (whole,) = expert_changes.export(made, ["a"], tmp_path / "one")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name in (GENERAL, "a"):
        base = PeftModel.from_pretrained(base, place / name).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(
            logits(tiny_llama, whole), base.eval()(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )
    served = expert_changes.export(made, [], tmp_path / "many")
    assert [path.name for path in served] == [GENERAL, "a", "b"]
    listed = json.loads((tmp_path / "many" / "lora_modules.json").read_text())
    assert listed == [{"name": name, "path": name} for name in (GENERAL, "a", "b")]
    ranks = [json.loads((path / "adapter_config.json").read_text())["r"] for path in served]
    assert ranks == [2, 4, 4]
    with pytest.raises(FedtuneError, match="M306: found expert 'a' of rank 4, expected at most 3"):
        expert_changes.export(made, [], tmp_path / "none", most=3)
    with pytest.raises(FedtuneError, match="C103: found expert 'x', expected one of general, a, b"):
        expert_changes.export(made, ["x"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_others_answer_to_the_bit_as_if_a_removed_owner_had_never_been_there(
    run: RunFolder, sovereign: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    place = expert_library.library(run)
    before, hashed = files_of(place), library_sha256(place)
    never = {
        name: logits(tiny_llama, expert_changes.export(run, [name], tmp_path / f"x{name}")[0])
        for name in "ab"
    }
    card = expert_library.add(run, sovereign, "owner")
    assert (card.made_by, card.beneath, card.rank) == ("owner", "", 3)
    with_it = library_sha256(place)
    assert with_it != hashed
    began = time.perf_counter()
    path = expert_library.remove(run, "owner", NOW)
    assert time.perf_counter() - began < 1
    assert files_of(place) == before and library_sha256(place) == hashed
    for name, answer in never.items():
        whole = expert_changes.export(run, [name], tmp_path / f"y{name}")[0]
        assert torch.equal(logits(tiny_llama, whole), answer)
    said = json.loads(path.read_text())
    assert (said["library_before"], said["library_after"]) == (with_it, hashed)
    assert said["expert_sha256"] == card.sha256 and said["when"] == NOW.isoformat()
    told = json.dumps({k: v for k, v in said.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    assert said["sha256"] == hashlib.sha256(told.encode()).hexdigest()


def files_of(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()
    }


def test_a_certificate_that_a_member_signed_is_checked_with_the_authority_alone(
    run: RunFolder, sovereign: Path, tmp_path: Path
) -> None:
    authority = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    expert_library.add(run, sovereign, "owner")
    path = expert_library.remove(run, "owner", NOW, authority.place("coordinator"))
    signed = Signed.from_json(path.read_bytes())
    check(signed, authority.certificate, utc_now() + timedelta(days=1), "certificate")
    assert json.loads(signed.record)["expert"] == "owner"


def test_what_cannot_be_taken_in_or_out_is_refused(
    run: RunFolder, sovereign: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedtuneError, match="C103: found 'general', beneath a, b"):
        expert_library.remove(run, GENERAL, NOW)
    with pytest.raises(FedtuneError, match="C103: found expert 'nobody'"):
        expert_library.remove(run, "nobody", NOW)
    for name in ("a", "../x", "A"):
        with pytest.raises(FedtuneError, match=r"C103: found .* as the id of a new expert"):
            expert_library.add(run, sovereign, name)
    shutil.copytree(sovereign, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    other = tmp_path / "base"
    shutil.copytree(tiny_llama, other)
    torch.manual_seed(9)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.model.layers[0].mlp.down_proj.weight.data.add_(0.01)
    base.save_pretrained(other)
    changed = json.dumps(config | {"base_model_name_or_path": str(other)})
    (tmp_path / "other" / "adapter_config.json").write_text(changed)
    with pytest.raises(FedtuneError, match="M304"):
        expert_library.add(run, tmp_path / "other", "other")
    assert list(cards(expert_library.library(run))) == [GENERAL, "a", "b"]


def test_every_expert_is_scored_on_every_client_and_choices_are_told_of_other_rows(
    run: RunFolder, sovereign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert_library.add(run, sovereign, "owner")
    matrix = expert_scores.evaluate(run)
    assert list(matrix.told_of) == ["base", GENERAL, "a", "b", "owner"] and len(matrix.clients) == 4
    assert matrix.metric == "perplexity" and matrix.chosen_on != matrix.told_of
    assert list(matrix.groups.values()) == ["a", "b", "a", "b"]
    for row in matrix.report():
        client, chosen = row["client"], row["best_expert"]
        assert chosen == min(
            (name for name in matrix.chosen_on if name != "base"),
            key=lambda name: matrix.chosen_on[name][client],
        )
        assert row["best"] == matrix.told_of[chosen][client] and row["oracle"] <= row["best"]
        assert row["fell_back"] == (chosen == GENERAL)
    worse = {name: dict.fromkeys(found, 9.0) for name, found in matrix.chosen_on.items()}
    flat = expert_scores.Matrix(matrix.metric, worse, matrix.told_of, matrix.groups)
    assert {row["best_expert"] for row in flat.report()} == {GENERAL}  # an expert must beat it
    assert main(["experts", "list", str(run.path)]) == main(["experts", "eval", str(run.path)]) == 0
    told = capsys.readouterr().out
    assert "the base" in told and "chosen on the first half" in told


def test_the_general_expert_beneath_counts_in_scores(run: RunFolder) -> None:
    """An expert whose B is zero is the general expert."""
    from safetensors.numpy import save_file

    file = expert_library.library(run) / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value * (".lora_B." not in name) for name, value in tensors.items()}, file)
    matrix = expert_scores.evaluate(run)
    for client in matrix.clients:
        assert matrix.told_of["a"][client] == pytest.approx(matrix.told_of[GENERAL][client], rel=1e-6)
        assert matrix.told_of["a"][client] != pytest.approx(matrix.told_of["base"][client], rel=1e-4)


def test_experts_are_merged_on_products_and_copies_are_pruned(run: RunFolder, sovereign: Path) -> None:
    place = expert_library.library(run)
    merged = expert_changes.merge(run, ["a", "b"], Asked("mean"), "both")
    card = cards(place)["both"]
    assert merged.rank == card.rank == 4 and card.parents == ("a", "b") and card.beneath == GENERAL
    assert card.owners == 4
    a, b, both = (read_expert(place / name).tensors for name in ("a", "b", "both"))
    name = next(name for name in a if ".lora_A." in name)
    product = lambda tensors: tensors[name.replace("_A.", "_B.")].astype(np.float64) @ tensors[name]
    np.testing.assert_allclose(product(both), (product(a) + product(b)) / 2, atol=1e-7)
    expert_library.add(run, sovereign, "owner")
    with pytest.raises(FedtuneError, match=r"C103.*stand on the same"):
        expert_changes.merge(run, ["a", "owner"], Asked("mean"), "odd")
    expert_library.remove(run, "both", NOW)
    expert_library.add(run, place / "a", "twin", on_general=True)
    matrix: Any = expert_scores.evaluate(run)
    gone = expert_changes.superfluous(run, 0.99, matrix)
    assert [(one, other) for one, other, _ in gone] == [("twin", "a")] and gone[0][2] == pytest.approx(1.0)
    assert expert_changes.superfluous(run, 1.1, matrix) == []


def test_mean_inputs_are_those_of_the_groups_rows(made: RunFolder) -> None:
    """Of all tokens of a group's members together, with the general expert in the model."""
    workspace, _, _ = installed(made, "last", data=True)
    for name, members in (("a", (0, 2)), ("b", (1, 3))):
        said = load_file(expert_library.library(made) / name / expert_library.INPUTS)
        found = [input_moments(workspace.tunable, workspace.train(number), 256) for number in members]
        tokens = [count for _, count in found]
        assert tokens == [
            sum(workspace.train(n).length(i) for i in range(len(workspace.train(n)))) for n in members
        ]
        for layer, value in said.items():
            want = sum(count * moments[layer] for moments, count in found) / sum(tokens)
            np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-6)
    assert len(said) == len(expert_scores.summed([read_expert(expert_library.library(made) / "a")])[1].shapes)


def test_a_router_over_a_runs_experts_is_scored_client_by_client(
    run: RunFolder, sovereign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = routed(run, Routing("means", "topk", 2))
    matrix = expert_scores.evaluate(run)
    assert said["losses"].keys() == set(matrix.clients)
    assert sum(said["health"]["shares"].values()) == pytest.approx(1)
    place = expert_library.library(run)
    expert_library.remove(run, "b", NOW)
    one = routed(run, Routing("arrow", "dense"))["losses"]  # over one expert, a router is that expert
    for client, loss in one.items():
        assert loss == pytest.approx(matrix.told_of["a"][client], rel=1e-5)
    shutil.copytree(place / "a", place / "twin")
    write(place / "twin", replace(cards(place)["a"], id="twin"))
    both = routed(run, Routing("means", "topp", p=0.3), null=False)
    assert both["losses"] == pytest.approx(one, rel=1e-5)
    assert main(["experts", "route", str(run.path), "--k", "1", "--local", "--null"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].split() == ["client", "base", "general", "own", "best", "oracle", "routed", "local"]
    assert len(told) >= 7 and "nobody" in told[7]
    expert_library.add(run, sovereign, "owner")
    with pytest.raises(FedtuneError, match=r"M305: found expert 'owner' without inputs.safetensors"):
        routed(run, Routing("means"))
    assert routed(run, Routing("arrow"))["losses"].keys() == set(matrix.clients)


def test_a_run_without_experts_is_a_library_of_its_general_one(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small.write_rows(tmp_path)
    folder, _, _ = small.play(small.recipe(tiny_bert, data, rounds=1), tmp_path / "lora")
    assert list(cards(expert_library.library(folder))) == [GENERAL]
    bias, _, _ = small.play(
        small.recipe(tiny_bert, data, rounds=1, method__adapter={"kind": "bias"}), tmp_path / "bias"
    )
    assert main(["experts", "list", str(bias.path)]) == 2
    assert "M306: found experts beside an adapter of kind 'bias'" in capsys.readouterr().err
