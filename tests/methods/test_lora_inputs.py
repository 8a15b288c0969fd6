"""EVA: a sum over clients is one client with all rows, and A's rows are what a PCA of the inputs finds. CorDA: the
factors are peft's of the same products, and the first model is the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer

from fedtune.errors import FedtuneError
from fedtune.methods.lora_inputs import MARK, directions
from fedtune.methods.lora_start import A_END, B_END, oriented
from fedtune.model.input_moments import input_moments
from fedtune.model.loss import summed_loss
from fedtune.runtime.check import check
from fedtune.runtime.checkpoints import load_state
from fedtune.types import State
from tests import small


def inputs_by_hook(tunable: Any, encoded: Any, module: str) -> np.ndarray:
    """(tokens, k): what one layer is given, row by row, so that nothing is padded."""
    seen: list[torch.Tensor] = []
    layer = tunable.net.get_submodule(module)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(args[0][0]))
    with torch.no_grad():
        for row in range(len(encoded)):
            batch = {name: value for name, value in encoded.collate([row]).items() if name != "labels"}
            tunable.net.eval()(**batch)
    handle.remove()
    return torch.cat(seen).double().numpy()


def test_a_run_begins_where_the_inputs_of_all_clients_vary_most(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """A learning rate next to nothing leaves A where it was begun."""
    recipe = small.recipe(tiny_bert, data, method__lora_start="eva", method__train__lr=1e-9, rounds=2)
    folder, _, _ = small.play(recipe, tmp_path)
    state, _ = load_state(folder, 2, "")
    workspace, link = small.workspace_of(recipe)
    first = link.method.start(workspace.tunable).shared
    name = "base_model.model.bert.encoder.layer.1.attention.self.query"
    clients = [workspace.train(number) for number in range(4)]
    found = [input_moments(workspace.tunable, client) for client in clients]
    rows = np.array([len(client) for client in clients]) / sum(map(len, clients))
    said = {
        f"{name}.{key}": sum(share * one[f"{name}.{key}"] for share, one in zip(rows, found, strict=True))
        for key in ("mean", "second")
    }
    wanted = directions(said, name, first[name + A_END])
    np.testing.assert_allclose(state.shared[name + A_END], wanted, atol=1e-3)
    assert np.abs(wanted - first[name + A_END]).max() > 0.1 and MARK not in state.kept


@pytest.mark.parametrize(
    "module", ["bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense"]
)
def test_moments_add_up_and_directions_are_a_pca(module: str, tiny_bert: Path, data: Path) -> None:
    workspace, link = small.workspace_of(
        small.recipe(tiny_bert, data, method__lora_start="eva", partition__clients=2)
    )
    tunable, name = workspace.tunable, f"base_model.model.{module}"
    parts = [workspace.train(number) for number in range(2)]
    rows = [inputs_by_hook(tunable, part, name) for part in parts]
    for part, own in zip(parts, rows, strict=True):
        found = input_moments(tunable, part)
        np.testing.assert_allclose(found[f"{name}.mean"], own.mean(0), atol=1e-6)
        np.testing.assert_allclose(found[f"{name}.second"], own.T @ own / len(own), atol=1e-5)
    said = {key: input_moments(tunable, parts[0])[f"{name}.{key}"] for key in ("mean", "second")}
    before = link.method.start(tunable).shared[name + A_END]
    made = directions({f"{name}.{key}": value for key, value in said.items()}, name, before)
    centred = rows[0] - rows[0].mean(0)
    vt = np.linalg.svd(centred, full_matrices=False)[2][:2]
    np.testing.assert_allclose(np.abs(np.sum(made * vt, axis=1)), 1.0, atol=1e-4)


def test_directions_that_inputs_do_not_have_stay_as_they_were() -> None:
    before = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    made = directions({"m.mean": x.mean(0), "m.second": x.T @ x / 2}, "m", before)
    assert made[0].tolist() == [1.0, 0.0, 0.0] and made[1].tolist() == before[1].tolist()


def test_the_first_model_is_the_base_and_check_counts_the_question(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, method__lora_start="eva")
    workspace, link = small.workspace_of(recipe)
    state: State = link.method.start(workspace.tunable)
    assert not any(value.any() for name, value in state.shared.items() if name.endswith(B_END))
    widths = [value.shape[1] for name, value in state.shared.items() if name.endswith(A_END)]
    numbers = sum(k * (k + 1) for k in widths)
    assert 4 * numbers < check(recipe).once.up < 4 * numbers + 4096


def corda(model: Path, data: Path, **changes: Any) -> Any:
    return small.recipe(model, data, method__lora_start="corda", **changes)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_cordas_factors_are_pefts_of_the_same_products(shape: tuple[int, int]) -> None:
    """Products of the pairs; peft leaves the size of either factor to how it scaled the inputs."""
    draw = np.random.default_rng(4)
    weight, inputs = (
        draw.normal(size=shape),
        draw.normal(size=(200, shape[1])) * draw.uniform(0.1, 3, shape[1]),
    )
    second = inputs.T @ inputs / 200
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = torch.from_numpy(weight).float()
    layer.covariance_matrix = torch.from_numpy(second).float()
    theirs = collect_eigens_for_layer(
        layer, LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    )
    wanted = (theirs.U_WC[:, :3] * theirs.S_WC[:3]) @ theirs.V_WC[:, :3].T
    for scale in (1.0, 8.0):
        b, a = oriented(weight, second, 3, scale)
        np.testing.assert_allclose(scale * b @ a, wanted, atol=2e-4)
        np.testing.assert_allclose(oriented(weight, 100 * second, 3, scale)[0], b, atol=1e-9)


def test_corda_begins_from_sums_with_the_base_and_trains_beside_a_residual(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = corda(tiny_bert, data, rounds=2, method__train__lr=1e-9, evaluate__centralised=True)
    folder, result, _ = small.play(recipe, tmp_path)
    assert result["centralised"] is not None
    state, _ = load_state(folder, 2, "")
    workspace, link = small.workspace_of(recipe)
    first = link.method.start(workspace.tunable)
    assert not any(value.any() for name, value in first.shared.items() if ".residual_" in name)
    module = "base_model.model.bert.encoder.layer.1.attention.self.query"
    parts = [workspace.train(number) for number in range(4)]
    rows = [inputs_by_hook(workspace.tunable, part, module) for part in parts]
    shares = np.array([len(part) for part in parts]) / sum(map(len, parts))
    second = sum(share * one.T @ one / len(one) for share, one in zip(shares, rows, strict=True))
    weight = workspace.base.weights["bert.encoder.layer.1.attention.self.query.weight"].detach().double()
    b, a = oriented(weight.numpy(), second, 2, 8.0)
    found = state.shared[module + B_END].astype(np.float64) @ state.shared[module + A_END]
    np.testing.assert_allclose(found, b @ a, atol=1e-4)
    rest = state.shared[module + ".residual_B"].astype(np.float64) @ state.shared[module + ".residual_A"]
    np.testing.assert_allclose(rest, -8.0 * found, atol=1e-5)
    assert np.abs(rest).max() > 0.05 and MARK not in state.kept
    encoded = workspace.train(0)

    def said() -> torch.Tensor:
        with torch.no_grad():
            return summed_loss(workspace.tunable, encoded.collate(range(6)))[1]

    link.method.install(first, workspace.tunable)
    base = said()
    link.method.install(state, workspace.tunable)
    assert torch.allclose(base, said(), atol=1e-5)
    checked = check(recipe)
    assert checked.once.up and result["trainable"] < workspace.tunable.trainable


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__train__weight_decay": 0.1}, "C104: found .*no decay|C104: found .*weight_decay"),
        ({"model__load": "4bit"}, "C104: found model.load = '4bit' with method.lora_start"),
        (
            {"downlink": {"step": "int8"}, "chain": [{"step": "quantize", "bits": 8}]},
            "C104: found .*downlink",
        ),
        ({"method__adapter": {"kind": "lora", "rank": 40}}, "M306: found method.lora_start with"),
        (
            {"chain": [{"step": "private"}], "method__weight": "equal", "data__task": "causal-lm"},
            "C104: found .* expected no sums over clients' inputs, which no noise covers",
        ),
    ],
)
def test_what_corda_cannot_start_from_is_refused(
    changes: dict[str, Any], said: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        recipe = corda(tiny_bert, data, **changes)
        workspace, link = small.workspace_of(recipe)
        link.method.start(workspace.tunable)
