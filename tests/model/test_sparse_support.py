"""Sparse kinds: positions as dense numpy finds them, the same for everybody, and full tuning where all are
chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from fedtune.config import method_of
from fedtune.errors import FedtuneError
from fedtune.model import sparse_support
from fedtune.model.export import load_adapter, save_adapter
from fedtune.model.fit import fit
from fedtune.model.memory_plan import plan
from fedtune.model.settings import TrainSettings
from fedtune.model.sparse_support import INDICES, PLACES, VALUES, base_print, greatest, low_rank, positions
from fedtune.model.tunable import attach, detach
from fedtune.runtime.workspace import link_of, workspace_of
from fedtune.schema import Schema
from fedtune.types import Round
from tests import small
from tests.tables import adapter_of

KINDS = {
    "random": {"kind": "shira", "rank": 4},
    "magnitude": {"kind": "shira", "rank": 4, "support": "magnitude"},
    "lift": {"kind": "lift", "rank": 4, "filter_rank": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def chosen(tunable: Any) -> dict[str, set[tuple[int, int]]]:
    """Layer, as the base calls it -> pairs of row and column."""
    return {
        name.removeprefix("base_model.model.").removesuffix(INDICES): set(map(tuple, value.T.tolist()))
        for name, value in positions(tunable.net).items()
    }


@every_kind
def test_as_many_as_lora_has_and_as_a_dense_twin_finds_them(kind: str, workspace: Any) -> None:
    base = workspace.base("encoder")
    tunable = attach(base, adapter_of(**KINDS[kind]), 1)
    found = chosen(tunable)
    assert len(found) == 13
    for name, pairs in found.items():
        weight = base.weights[name + ".weight"].detach().double().numpy()
        assert len(pairs) == 4 * sum(weight.shape)
        if kind == "random":
            continue
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        size = np.abs(weight if kind == "magnitude" else (u[:, :3] * s[:3]) @ vt[:3])
        rest = np.ones(size.shape, bool)
        rest[tuple(np.array(sorted(pairs)).T)] = False
        assert size[~rest].min() >= size[rest].max() - 1e-12


def test_positions_do_not_depend_on_the_runs_seed_and_a_draw_on_its_own(workspace: Any) -> None:
    base = workspace.base("encoder")
    one, two, other = (
        chosen(attach(base, adapter_of(kind="shira", rank=4, seed=seed), run))
        for seed, run in ((0, 1), (0, 2), (1, 1))
    )
    assert one == two != other
    supports = list(one.values())
    assert len({frozenset(support) for support in supports}) == len(supports)  # each layer draws its own


def test_equal_sizes_are_told_apart_by_their_place() -> None:
    assert greatest(np.array([[1.0, 3.0], [3.0, 3.0]]), 2).tolist() == [1, 2]
    assert greatest(np.zeros((2, 3)), 6).tolist() == list(range(6))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_a_low_rank_twin_is_the_svds(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(1).normal(size=shape)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(low_rank(weight, 2), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-12)
    np.testing.assert_allclose(low_rank(weight, 99), weight, atol=1e-12)


def test_every_position_of_a_layer_is_full_tuning_of_it(workspace: Any) -> None:
    """A square weight of 32 x 32 has 16 x (32 + 32) positions. Values are changes and not weights, so the last
    digits are not full tuning's."""
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    train = TrainSettings(optimizer="sgd", lr=0.1, head_lr=0.0, steps=4, batch=6)
    name = "bert.encoder.layer.1.attention.self.query"
    before = base.weights[f"{name}.weight"].detach().numpy().copy()
    whole = attach(base, adapter_of(kind="full", only=(f"{name}.weight",)), 1)
    fit(whole, encoded, train, 2)
    moved = whole.read()[f"{name}.weight"] - before
    detach(whole)
    sparse = attach(base, adapter_of(kind="shira", rank=16, targets=(name,)), 1)
    fit(sparse, encoded, train, 2)
    values = sparse.read()[f"base_model.model.{name}{VALUES}"].reshape(32, 32)
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(values, moved, atol=1e-6)


def test_a_change_is_made_as_peft_makes_it_to_the_bit(workspace: Any) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(**KINDS["lift"]), 1)
    fit(tunable, workspace.encoded("encoder"), TrainSettings(lr=1e-2, steps=2), 2)
    for layer in sparse_support.sparse_layers(tunable.net).values():
        theirs = type(layer).get_delta_weight(layer, "default").to_dense()
        assert torch.equal(layer.get_delta_weight("default"), theirs)


@every_kind
def test_check_finds_the_same_shapes_without_weights(kind: str, workspace: Any) -> None:
    adapter = adapter_of(**KINDS[kind])
    planned = plan(workspace.settings("encoder"), adapter, "classify", 2)
    tunable = attach(workspace.base("encoder"), adapter, 1)
    assert planned.shapes == {name: tuple(value.shape) for name, value in tunable.named.items()}
    assert planned.peak(TrainSettings(), 2, 8)  # a step can be tried out


def test_a_party_that_chose_otherwise_has_another_print(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = workspace.base("encoder")
    detach(attach(base, adapter_of(), 1))
    assert base_print(base) == base.fingerprint
    attach(base, adapter_of(), 1)
    assert base_print(base) == base.fingerprint
    attach(base, adapter_of(**KINDS["lift"]), 1)
    mine = base_print(base)
    attach(base, adapter_of(**KINDS["lift"]), 2)
    assert base_print(base) == mine != base.fingerprint
    exact = sparse_support.low_rank
    monkeypatch.setattr(sparse_support, "low_rank", lambda weight, rank: exact(weight, rank + 1))
    attach(base, adapter_of(**KINDS["lift"]), 1)
    assert base_print(base) != mine


def test_the_print_is_what_coordinator_and_sites_compare(
    tiny_bert: Path, tmp_path: Path, workspace: Any
) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), method__adapter=KINDS["lift"])
    made = workspace_of(recipe)
    link = link_of(made, method_of(recipe))
    assert link.base == base_print(made.base) != made.base.fingerprint
    assert link.header("train", 0, Round(1, 1, (0,)), Schema(())).base == link.base


def test_values_for_other_positions_are_not_loaded(workspace: Any, tmp_path: Path) -> None:
    base = workspace.base("encoder")
    save_adapter(attach(base, adapter_of(**KINDS["random"]), 1), tmp_path, "x", "")
    file = tmp_path / "adapter_model.safetensors"
    held = safetensors.numpy.load_file(file)
    name = next(name for name in held if name.endswith(INDICES))
    held[name] = held[name][:, ::-1].copy()
    safetensors.numpy.save_file(held, file)
    with pytest.raises(FedtuneError, match=r"M304: .*other positions of 'base_model.model.bert"):
        load_adapter(base, tmp_path)
    assert base.attached is None


def test_more_positions_than_a_layer_has_are_refused(workspace: Any) -> None:
    with pytest.raises(FedtuneError, match=r"M306: found method.adapter.rank = 17 .* expected at most 16"):
        attach(workspace.base("encoder"), adapter_of(kind="lift", rank=17), 1)
    assert workspace.base("encoder").attached is None


def test_nothing_but_values_travels(workspace: Any) -> None:
    """And what stock peft would send, were it asked: indices beside them."""
    tunable = attach(workspace.base("encoder"), adapter_of(**KINDS["random"]), 1)
    assert not any(name.endswith(INDICES) for name in tunable.read())
    assert any(name.endswith(INDICES) for name in peft.get_peft_model_state_dict(tunable.net))


DSEE = {"kind": "dsee", "share": 0.05, "rank": 2, "alpha": 4.0}


def test_the_greatest_weights_and_a_pair_beside_them_are_trained(workspace: Any) -> None:
    """The change is the sum of both, as written out by hand; positions are numpy's, whatever peft's topk says
    of equal weights."""
    base = workspace.base("encoder")
    tunable = attach(base, adapter_of(**DSEE), 1)
    fit(tunable, workspace.encoded("encoder"), TrainSettings(lr=1e-2, steps=2), 2)
    places, values = positions(tunable.net), tunable.read()
    assert len(places) == 13
    for name, layer in sparse_support.sparse_layers(tunable.net).items():
        weight = layer.get_base_layer().weight.detach().numpy()
        chosen = places[name + PLACES]
        size = np.abs(weight).reshape(-1)
        assert chosen.tolist() == np.sort(np.argsort(-size, kind="stable")[: len(chosen)]).tolist()
        assert len(chosen) == int(0.05 * weight.size)
        wanted = np.zeros(weight.size, np.float32)
        wanted[chosen] = values[f"{name}.supertuning_values"]
        a, b = (values[f"{name}.supertuning_lora_{which}.weight"] for which in "AB")
        found = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(found, wanted.reshape(weight.shape) + 2.0 * b @ a, atol=1e-7)
        assert np.abs(wanted).max() > 1e-3 and np.abs(b @ a).max() > 1e-5
    planned = plan(workspace.settings("encoder"), adapter_of(**DSEE), "classify", 2)
    assert planned.shapes == {name: tuple(value.shape) for name, value in tunable.named.items()}


def test_a_pair_beside_a_support_has_a_print_of_its_own_too(workspace: Any, tmp_path: Path) -> None:
    base = workspace.base("encoder")
    attach(base, adapter_of(**DSEE), 1)
    mine = base_print(base)
    attach(base, adapter_of(**DSEE), 2)
    assert base_print(base) == mine != base.fingerprint
    tunable = attach(base, adapter_of(**{**DSEE, "share": 0.06}), 1)
    assert base_print(base) != mine
    save_adapter(tunable, tmp_path, "x", "")
    file = tmp_path / "adapter_model.safetensors"
    held = safetensors.numpy.load_file(file)
    name = next(name for name in held if name.endswith(PLACES))
    held[name] = held[name][::-1].copy()
    safetensors.numpy.save_file(held, file)
    with pytest.raises(FedtuneError, match=r"M304: .*other positions of 'base_model.model.bert"):
        load_adapter(base, tmp_path)


def test_a_share_of_less_than_one_weight_is_refused(workspace: Any) -> None:
    with pytest.raises(FedtuneError, match=r"M306: .*1 / 0\.0001 weights or more"):
        attach(workspace.base("encoder"), adapter_of(kind="dsee", share=1e-4), 1)
