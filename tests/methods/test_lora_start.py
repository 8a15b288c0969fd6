"""PiSSA and OLoRA: factors and weights as peft has them, a base that stays, and an export that stock peft loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from fedtune.config import parse
from fedtune.errors import FedtuneError
from fedtune.events import ClientDone
from fedtune.methods.lora_start import A_END, B_END
from fedtune.model.fit import step_batches
from fedtune.model.loss import summed_loss
from fedtune.rng import seed_of
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.types import Round, State
from tests import small
from tests.tunables import bare

STARTS = ("pissa", "olora")
every_start = pytest.mark.parametrize("kind", STARTS)


def logits(tunable: Any, encoded: Any) -> torch.Tensor:
    with torch.no_grad():
        return summed_loss(tunable, encoded.collate(range(6)))[1]


def theirs(model: Path, kind: str, **more: Any) -> Any:
    """peft's own start, which takes the factors out of the weights."""
    net = transformers.AutoModel.from_pretrained(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=16.0, init_lora_weights=kind, target_modules=["query", "value", "dense"], **more
    )
    return peft.get_peft_model(net, config)


@every_start
def test_the_first_model_is_the_base_and_the_factors_are_pefts(
    kind: str, tiny_bert: Path, data: Path
) -> None:
    workspace, link = small.workspace_of(small.recipe(tiny_bert, data, method__lora_start=kind))
    base, tunable = workspace.base, workspace.tunable
    before = {name: value.detach().clone() for name, value in base.weights.items()}
    encoded = workspace.train(0)
    state = link.method.start(tunable)
    link.method.install(state, tunable)
    started = logits(tunable, encoded)
    assert all(torch.equal(base.weights[name], value) for name, value in before.items())
    net = theirs(tiny_bert, kind)
    modules = {name.removesuffix(B_END) for name in state.shared if name.endswith(B_END)}
    assert len(modules) == 13
    for module in modules:
        ours = state.shared[module + B_END].astype(np.float64) @ state.shared[module + A_END]
        assert np.linalg.norm(ours) > 0.1
        rest = state.shared[module + ".residual_B"].astype(np.float64) @ state.shared[module + ".residual_A"]
        np.testing.assert_array_equal(rest, -8.0 * ours)  # the scale: exact, a power of two
        name = module.removeprefix("base_model.model.bert.")
        if "key" in name:
            continue  # of theirs not a target
        layer = net.base_model.model.get_submodule(name)
        np.testing.assert_allclose(ours * 8.0, layer.get_delta_weight("default").detach(), atol=2e-5)
    untouched = logits(bare(base), encoded)
    assert torch.allclose(started, untouched, atol=1e-5)


def test_a_client_trains_what_pefts_pissa_trains(tiny_bert: Path, data: Path) -> None:
    """Weights without their greatest directions and factors of these, in a loop as anybody would write it."""
    recipe = small.recipe(
        tiny_bert, data, method__lora_start="pissa", method__adapter__targets=["query"], partition__clients=1
    )
    workspace, link = small.workspace_of(recipe)
    state = link.method.start(workspace.tunable)
    now = Round(1, recipe.seed, (0,))
    said = link.method.verbs["train"].work(workspace.client_with(0, {}), state.shared, now).values()
    encoded, train = workspace.train(0), recipe.method.train
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    net.config.problem_type = "single_label_classification"
    config = peft.LoraConfig(
        r=2,
        lora_alpha=16.0,
        init_lora_weights="pissa",
        target_modules=["query"],
        modules_to_save=["classifier"],
    )
    stock = peft.get_peft_model(net, config).train()
    own = dict(stock.named_parameters())
    with torch.no_grad():
        for name in ("weight", "bias"):
            whole = f"base_model.model.classifier.modules_to_save.default.{name}"
            own[whole].copy_(torch.from_numpy(state.shared[f"base_model.model.classifier.{name}"]))
    optimizer = torch.optim.AdamW([v for v in own.values() if v.requires_grad], lr=train.lr, weight_decay=0.0)
    for (indices,) in step_batches(len(encoded), train, seed_of("train", recipe.seed, 1, 0)):
        optimizer.zero_grad()
        stock(**encoded.collate(indices)).loss.backward()
        optimizer.step()
    for layer in (0, 1):
        module = f"base_model.model.bert.encoder.layer.{layer}.attention.self.query"
        ours = said[module + B_END].astype(np.float64) @ said[module + A_END]
        one = stock.get_submodule(module)
        wanted = (one.lora_B["default"].weight @ one.lora_A["default"].weight).detach().numpy()
        first = state.shared[module + B_END].astype(np.float64) @ state.shared[module + A_END]
        assert np.abs(ours - first).max() > 1e-3
        np.testing.assert_allclose(ours, wanted, atol=5e-5)


@every_start
def test_a_run_moves_the_factors_alone_and_stock_peft_loads_its_export(
    kind: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, rounds=2, method__lora_start=kind)
    folder, result, events = small.play(recipe, tmp_path)
    checked = check(recipe)
    said = "\n".join(rows(checked))  # though the export's rank is twice the trained one
    assert f"trained   {result['trainable']:,} of" in said
    done = [event for event in events if isinstance(event, ClientDone)]
    assert {event.down_bytes for event in done} == {checked.down_bytes}
    assert all(abs(event.up_bytes - checked.up_bytes) < 64 for event in done)
    workspace, link = small.workspace_of(recipe)
    start, (end, _) = link.method.start(workspace.tunable), load_state(folder, 2, "")
    for name, value in start.shared.items():
        assert np.array_equal(end.shared[name], value) is (".residual_" in name), name
    link.method.install(State(end.shared), workspace.tunable)
    encoded = workspace.train(0)
    want = logits(workspace.tunable, encoded)
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["init_lora_weights"] is True
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = peft.PeftModel.from_pretrained(net, str(folder.adapter)).eval()
    batch = {name: value for name, value in encoded.collate(range(6)).items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(stock(**batch).logits, want, atol=1e-5)


REFUSED = {
    "another kind": {"method__adapter": {"kind": "bias"}},
    "a factor that rests": {"aggregate": {"rule": "ffa"}},
    "a factor at home": {"aggregate": {"rule": "fedsa"}},
    "another residual": {"aggregate": {"rule": "fedex", "extra": 4}},
    "ranks": {"method__lora_rank_by_client": [1, 2], "aggregate": {"rule": "flexlora"}},
    "decay": {"method__train__weight_decay": 0.1},
    "a start": {"method__start_from": "somewhere"},
    "dora": {"method__adapter__dora": True},
    "a lossy way down": {"downlink": {"step": "int8"}, "chain": [{"step": "quantize", "bits": 8}]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_with_a_start_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=r"C104: found .*method\.lora_start"):
        parse(small.tree(Path("none"), tmp_path, method__lora_start="pissa", **REFUSED[name]))


def test_a_rank_beyond_a_layers_own_is_refused(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, method__lora_start="pissa", method__adapter__rank=40)
    workspace, link = small.workspace_of(recipe)
    with pytest.raises(FedtuneError, match=r"M306: found method.lora_start with '.*' of 32 x 32"):
        link.method.start(workspace.tunable)
