"""Offsite tuning: the emulator is the model without some blocks, and what was trained on it is plugged into the model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from fedtune.config import method_of
from fedtune.errors import FedtuneError
from fedtune.methods.offsite import emulation_of
from fedtune.model.base import load
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import TunableModel
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.emulator import write_emulator
from fedtune.runtime.finished import export_run
from fedtune.runtime.workspace import link_of
from tests import small
from tests.deploy.inside import FakeGrid, inside
from tests.models.families import FAMILIES
from tests.models.folders import make

BLOCKS = 8
KEPT = (0, 1, 5, 6, 7)  # first 1, last 2, half of the 5 between
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
TABLE: dict[str, Any] = {
    "type": "offsite", "first": 1, "last": 2, "keep": 0.5,
    "adapter": {"kind": "lora", "rank": 2},
    "train": {"lr": 0.01, "steps": 2, "batch": 4},
}  # fmt: skip
CAUSAL = {"data__task": "causal-lm", "data__max_length": 24, "evaluate__base": True}


def deep(name: str, folder: Path, blocks: int = BLOCKS) -> Path:
    family = FAMILIES[name]
    depth = next(key for key in DEPTH if key in family.config)
    return make(replace(family, config=family.config | {depth: blocks}), folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep("Llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"), 60)


Played = tuple[small.RunFolder, dict[str, Any]]


@pytest.fixture(scope="module")
def played(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    recipe = small.recipe(llama, data, method=TABLE | {"full": True}, **CAUSAL)
    folder, result, _ = small.play(recipe, tmp_path_factory.mktemp("run"))
    return folder, result


def pruned(model: Path, kept: tuple[int, ...], layers: str = "model.layers") -> Any:
    """Stock transformers, with blocks taken out by hand."""
    net = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    blocks = net.get_submodule(layers)
    path, _, key = layers.rpartition(".")
    setattr(net.get_submodule(path), key, torch.nn.ModuleList([blocks[number] for number in kept]))
    net.config.num_hidden_layers = len(kept)
    return net


def bench(model: Path, data: Path, **table: Any) -> TunableModel:
    recipe = small.recipe(model, data, method=TABLE | table, **CAUSAL)
    return small.workspace_of(recipe)[0].tunable


def said(net: Any, length: int = 9) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(5, 5 + length)[None]
        logits: torch.Tensor = net(input_ids=ids, use_cache=False).logits
    return logits


# --- the emulator


@pytest.mark.parametrize(
    ("name", "layers"),
    [("Llama", "model.layers"), ("GPT-2", "transformer.h"), ("BLOOM", "transformer.h"),
     ("GPT-NeoX", "gpt_neox.layers"), ("Mixtral", "model.layers")],
)  # fmt: skip
def test_the_emulator_is_the_model_without_the_other_blocks(
    name: str, layers: str, data: Path, tmp_path: Path
) -> None:
    model = deep(name, tmp_path / "model")
    tunable = bench(model, data)
    small_net = tunable.at_clients.base
    assert tunable.emulator is not None and emulation_of(tunable.emulator).kept == KEPT
    torch.testing.assert_close(said(tunable.at_clients.net), said(pruned(model, KEPT, layers)))
    whole = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    torch.testing.assert_close(said(tunable.net), said(whole))  # B is zero: the model itself
    own = {value.data_ptr() for value in tunable.base.weights.values()}
    assert all(value.data_ptr() in own for value in small_net.weights.values())  # not a byte is copied


def test_blocks_of_two_sorts_are_listed_one_by_one_in_the_emulators_configuration(
    data: Path, tmp_path: Path
) -> None:
    """Gemma 2 looks through a window in every other block: which, must follow the blocks."""
    model = deep("Gemma 2", tmp_path / "model")
    config = bench(model, data).at_clients.base.net.config
    whole = transformers.AutoConfig.from_pretrained(model).layer_types
    assert len(set(whole)) == 2 and list(config.layer_types) == [whole[number] for number in KEPT]


def test_a_model_whose_blocks_its_configuration_cannot_tell_apart_is_refused(
    data: Path, tmp_path: Path
) -> None:
    """GPT-2 may scale attention by the block's own number, which in an emulator is another."""
    folder = deep("GPT-2", tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.scale_attn_by_inverse_layer_idx = True
    config.save_pretrained(folder)
    with pytest.raises(
        FedtuneError, match=r"S721: found a GPT2LMHeadModel.*block 5 would differ in attn.scaling"
    ):
        bench(folder, data)


def test_rounding_is_per_output_and_leaves_the_ends_alone(llama: Path, data: Path) -> None:
    exact, rounded = bench(llama, data).at_clients.base, bench(llama, data, bits=4).at_clients.base
    for name, value in exact.weights.items():
        mine, other = value.numpy(), rounded.weights[name].numpy()
        if mine.ndim == 2 and name.startswith(("model.layers.1.", "model.layers.2.")):
            scale = np.abs(mine).max(axis=1, keepdims=True) / 7
            np.testing.assert_allclose(other, np.round(mine / scale) * scale, rtol=1e-6, atol=1e-7)
            assert len(np.unique(other[0])) <= 15 and not np.array_equal(mine, other)
        else:
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("first", "last", "keep", "blocks", "kept"),
    [
        (2, 2, 0.5, 12, [0, 1, 2, 4, 7, 9, 10, 11]),
        (0, 1, 1.0, 3, [0, 1, 2]),
        (1, 1, 0.2, 5, [0, 2, 4]),
        (1, 0, 0.5, 5, [0, 1, 4]),
    ],
)
def test_what_is_kept_lies_at_even_distances(
    first: int, last: int, keep: float, blocks: int, kept: list[int], llama: Path, data: Path
) -> None:
    """uniform_choose_layers of the paper's code: round(i * (n - 1) / (m - 1)), m of n."""
    table = small.recipe(llama, data, method={**TABLE, "first": first, "last": last, "keep": keep, "bits": 8})
    assert list(table.method.kept(blocks)) == kept  # type: ignore[attr-defined]


# --- what comes of it


def test_the_result_has_four_lines_and_each_is_what_stock_transformers_says(
    played: Played, llama: Path, data: Path
) -> None:
    folder, result = played
    assert set(result["also"]) == {"emulator", "emulator tuned", "full tuning"}
    workspace, _ = small.workspace_of(small.recipe(llama, data, method=TABLE, **CAUSAL))
    encoded = workspace.test()
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    assert result["base"] == pytest.approx(perplexity(model, encoded), rel=1e-4)
    assert result["also"]["emulator"] == pytest.approx(perplexity(pruned(llama, KEPT), encoded), rel=1e-4)
    adapter = peft.PeftModel.from_pretrained(model, str(folder.adapter)).eval()
    assert result["federated"] == pytest.approx(perplexity(adapter, encoded), rel=1e-4)
    values = [result["base"], result["federated"], *result["also"].values()]
    assert len({round(value, 3) for value in values}) == 5 and result["also"]["full tuning"] < result["base"]


def perplexity(net: Any, encoded: Any) -> float:
    loss, count = 0.0, 0
    for number in range(len(encoded)):
        batch = encoded.collate([number])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = net(**batch, use_cache=False).logits[:, :-1]
        loss += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += int((labels != -100).sum())
    return math.exp(loss / count)


def test_what_was_trained_in_the_emulator_is_in_the_models_own_ends(
    played: Played, llama: Path, tmp_path: Path
) -> None:
    folder, result = played
    state, _ = load_state(folder, 3, "")
    places = {name.split("layers.")[1].split(".")[0] for name in state.shared}
    assert places == {"0", "3", "4"} and result["trainable"] == sum(v.size for v in state.shared.values())
    merged = tmp_path / "merged"
    export_run(folder, "merged", merged)
    found = transformers.AutoModelForCausalLM.from_pretrained(merged)
    weights = dict(transformers.AutoModelForCausalLM.from_pretrained(llama).named_parameters())
    for name, value in found.named_parameters():
        pair, number = f"base_model.model.{name.removesuffix('.weight')}", name.split("layers.")[-1][0]
        if number in "067" and ("self_attn" in name or "mlp" in name):
            pair = pair.replace(f"layers.{number}", f"layers.{KEPT.index(int(number))}")
            a, b = (state.shared[f"{pair}.lora_{factor}.weight"] for factor in "AB")
            want = weights[name] + 8.0 * torch.from_numpy(b @ a)  # alpha / rank
            torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    stock = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(llama), str(folder.adapter)
    )
    torch.testing.assert_close(said(stock.eval()), said(found.eval()), rtol=1e-4, atol=1e-4)


def test_sites_with_the_emulators_folder_alone_end_with_the_same_bytes(
    played: Played, llama: Path, data: Path, tmp_path: Path
) -> None:
    """As real sites are: stock transformers loads the folder, and clients need nothing else."""
    _, result = played
    recipe = small.recipe(llama, data, method=TABLE, **CAUSAL)
    lines = write_emulator(recipe, tmp_path / "emulator")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "emulator").eval()
    torch.testing.assert_close(said(stock), said(pruned(llama, KEPT)))
    at_site = small.recipe(tmp_path / "emulator", data, method=TABLE, **CAUSAL)
    workspace, owner = (small.workspace_of(one)[0] for one in (at_site, recipe))
    link, owners_link = (link_of(one, method_of(one.recipe)) for one in (workspace, owner))
    assert workspace.tunable.emulator is None and link.base == owners_link.base != owner.base.fingerprint
    assert lines[1].endswith(owner.base.fingerprint) and lines[2].endswith(link.base)
    assert workspace.base.net.config.fedtune_emulator["of"] == owner.base.fingerprint
    _, other, _ = small.play(at_site, tmp_path / "run")
    assert other["state_sha256"] == result["state_sha256"]


@pytest.mark.thorough
def test_workers_of_real_sites_train_the_emulator_and_the_owner_plugs_it_in(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    """The owner's model is in no site's configuration: its workers load the emulator's folder, the coordinator
    the model. Both ends meet in the bytes, and in the result, of one process."""
    made = {"method": TABLE, "partition__clients": 3, "rounds": 2, **CAUSAL}
    recipe = small.recipe(llama, data, **made)
    local, result, _ = small.play(recipe, tmp_path / "local")
    write_emulator(recipe, tmp_path / "emulator")
    with inside(tmp_path, llama, data, **made) as run:
        workers = run.workers(model=str(tmp_path / "emulator"))
        run.conduct(FakeGrid(workers))
        found = run.folder.read_json("result.json")
        for name in ("state_sha256", "federated", "figures"):
            assert found[name] == result[name]
        assert run.folder.state(2).read_bytes() == local.state(2).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": TABLE | {"adapter": {"kind": "full"}}},
        *(
            pytest.param(changes, marks=pytest.mark.thorough)
            for changes in (
                {"aggregate": {"rule": "ffa"}},
                {"method": TABLE | {"lora_start": "pissa"}},
                {
                    "aggregate": {"rule": "flora", "extra": 4},
                    "method": TABLE | {"lora_rank_by_client": [1, 2]},
                },
            )
        ),
    ],
    ids=["full", "ffa", "pissa", "flora"],
)
def test_other_kinds_and_rules_are_plugged_in_too(
    changes: dict[str, Any], llama: Path, data: Path, tmp_path: Path
) -> None:
    """The model with the trained ends, against one whose ends are copied by hand from the tuned emulator."""
    recipe = small.recipe(llama, data, **{"method": TABLE, **CAUSAL, **changes})
    folder, result, _ = small.play(recipe, tmp_path)
    workspace, link = small.workspace_of(recipe)
    tunable, method = workspace.tunable, link.method
    state, _ = load_state(folder, 3, "")
    method.install(state, tunable)
    plugged = said(tunable.net)
    end = type("End", (), {"state": state, "tunable": tunable})
    tuned = method.capabilities.also_scored["emulator tuned"](end).net  # type: ignore[arg-type]
    ends = copy.deepcopy(tuned.get_submodule("base_model.model.model.layers" if "peft" in type(tuned).__module__ else "model.layers"))  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    for place in (0, 6, 7):
        model.model.layers[place] = ends[KEPT.index(place)]
    torch.testing.assert_close(plugged, said(model), rtol=1e-4, atol=1e-5)
    assert result["federated"] != pytest.approx(result["base"], rel=1e-4)


# --- what is refused, and what is said before a run


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        ({"first": 5, "last": 4}, "S721", "which overlap"),
        ({"first": 4, "last": 4}, "S721", "leave nothing between"),
        ({"keep": 0.01}, "S721", "an emulator without any"),
        ({"first": 0, "last": 0}, "C104", "a block to train"),
        ({"keep": 1.0}, "C104", "not the model itself"),
        ({"adapter": {"kind": "prompt"}}, "C104", "a kind whose tensors stand in single blocks"),
        ({"adapter": {"kind": "lora", "last": 1}}, "C104", "method.first and method.last"),
        ({"adapter": {"kind": "full", "band": [0.0, 0.5]}}, "C104", "method.first and method.last"),
        ({"adapter": {"kind": "shira"}}, "C104", "a kind whose tensors stand in single blocks"),
        ({"start_from": "somewhere"}, "C104", "a fresh adapter"),
        ({"lora_rank_by_client": "auto"}, "C104", "ranks in numbers"),
        ({"adapter": {"kind": "full", "only": ["*.layers.3.*"]}}, "S721", "trains nothing in blocks"),
    ],
)
def test_what_makes_no_emulator_is_refused_in_a_sentence(
    table: dict[str, Any], code: str, words: str, llama: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=words) as refused:
        check(small.recipe(llama, data, method=TABLE | table, **CAUSAL))
    assert refused.value.code == code


def test_a_site_with_the_emulator_of_another_recipe_is_refused(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    write_emulator(small.recipe(llama, data, method=TABLE, **CAUSAL), tmp_path / "emulator")
    with pytest.raises(FedtuneError, match=r"S721: found an emulator of blocks \(0, 1, 5, 6, 7\)"):
        bench(tmp_path / "emulator", data, keep=0.8)
    plain = small.recipe(llama, data, **CAUSAL)
    with pytest.raises(FedtuneError, match=r"C104: found method\.type = 'fedpeft' with fedtune offsite"):
        write_emulator(plain, tmp_path / "other")


def test_the_check_counts_the_emulator_and_says_what_it_gives_away(llama: Path, data: Path) -> None:
    recipe = small.recipe(llama, data, method=TABLE, **CAUSAL)
    checked, lines = check(recipe), rows(check(recipe))
    emulator = small.workspace_of(recipe)[0].tunable.at_clients
    assert checked.memory["base model"] == sum(4 * v.numel() for v in emulator.base.weights.values())
    assert (checked.plan.trainable, checked.plan.total) == (emulator.trainable, emulator.total)
    base = load(ModelSettings(name=str(llama)), "causal-lm", (), 3)
    share = 100 * emulator.base.size / base.size
    assert any(
        f"5 of the model's 8 blocks {KEPT}: {share:.1f} % of its values as they are" in one for one in lines
    )
    assert any("every client holds of the owner's model" in one for one in lines)
