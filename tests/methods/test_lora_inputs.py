"""EVA: a sum over clients is one client with all rows, and A's rows are what a PCA of the inputs finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.methods.lora_inputs import MARK, directions
from fedtune.methods.lora_start import A_END, B_END
from fedtune.model.input_moments import input_moments
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
