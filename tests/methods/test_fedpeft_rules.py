"""Rules of [aggregate] in a running federation: what travels, what stays at home, what the result is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from fedtune.aggregate import RULES, Mean
from fedtune.errors import FedtuneError
from fedtune.events import ClientDone, Event, RoundDone
from fedtune.model.lora_ranks import resize, stack, training_only, unstack
from fedtune.runtime.checkpoints import ClientStates, load_state
from fedtune.runtime.finished import export_run
from fedtune.runtime.workspace import build_workspace
from fedtune.types import State, Tensors
from tests import small
from tests.marks import mostly_thorough

A, B = ".lora_A.weight", ".lora_B.weight"


def played(
    model: Path, data: Path, root: Path, rule: str, **more: Any
) -> tuple[small.RunFolder, list[Event], dict[str, Any]]:
    own = {key: more.pop(key) for key in ("extra", "faulty", "by", "bound") if key in more}
    folder, result, events = small.play(
        small.recipe(model, data, aggregate={"rule": rule, **own}, **more), root
    )
    return folder, events, result


def states(folder: small.RunFolder, number: int) -> State:
    return load_state(folder, number, "")[0]


def factors(tensors: Tensors, end: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if name.endswith(end)}


def test_ffa_never_sends_or_moves_a(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    folder, events, _ = played(tiny_bert, data, tmp_path / "ffa", "ffa")
    assert not factors(states(folder, 3).shared, A) and factors(states(folder, 3).shared, B)
    _, plain, _ = played(tiny_bert, data, tmp_path / "mean", "mean")
    sizes = [
        {e.up_bytes for e in run if isinstance(e, ClientDone) and e.client == 1}.pop()
        for run in (events, plain)
    ]
    counts = sum(
        4 * value.size
        for value in factors(states(small.RunFolder(tmp_path / "mean" / "run"), 3).shared, A).values()
    )
    assert sizes[1] - sizes[0] == pytest.approx(counts, abs=8)


def test_rolora_moves_b_in_odd_rounds_and_a_in_even_ones(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data, aggregate={"rule": "rolora"}, rounds=2)
    workspace = build_workspace(
        recipe, recipe.method.build(2, recipe.aggregate), ClientStates(None), lambda event: None
    )
    first = recipe.method.build(2, recipe.aggregate).start(workspace.tunable).shared
    seen: list[Tensors] = []

    def look(event: Event) -> None:
        if isinstance(event, RoundDone):
            seen.append(states(small.RunFolder(tmp_path / "run"), event.round).shared)

    small.play(recipe, tmp_path, tell=look)
    one, two = seen
    for name in factors(first, A):
        np.testing.assert_array_equal(one[name], first[name])
        assert np.any(two[name] != one[name])
    for name in factors(first, B):
        assert np.any(one[name] != first[name])
        np.testing.assert_array_equal(two[name], one[name])


def test_fedsa_keeps_each_clients_b_at_home_until_the_last_round(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, events, _ = played(tiny_bert, data, tmp_path, "fedsa")
    state = states(folder, 3)
    assert factors(state.shared, A) and not factors(state.shared, B)
    up = {e.round: e.up_bytes for e in events if isinstance(e, ClientDone) and e.client == 1}
    own = {name.removeprefix("own/"): value for name, value in state.kept.items() if name.startswith("own/")}
    assert up[1] == up[2] and up[3] - up[1] == pytest.approx(
        sum(4 * value.size for value in own.values()), abs=8
    )
    assert any(np.any(value != 0) for value in own.values())


def test_clients_of_three_ranks_are_given_and_send_their_own(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, events, _ = played(
        tiny_bert,
        data,
        tmp_path,
        "flexlora",
        method__lora_rank_by_client=[1, 2, 4],
        method__adapter={"kind": "lora", "rank": 4},
    )
    done = {e.client: e for e in events if isinstance(e, ClientDone) and e.round == 2}
    assert done[0].up_bytes < done[1].up_bytes < done[2].up_bytes and done[3].up_bytes == pytest.approx(
        done[0].up_bytes, abs=4
    )
    assert done[0].down_bytes < done[1].down_bytes < done[2].down_bytes
    assert {value.shape[0] for value in factors(states(folder, 3).shared, A).values()} == {4}
    metrics = [e.metrics for e in events if isinstance(e, RoundDone)]
    assert all("error" in m and any(name.startswith("error/") for name in m) for m in metrics)
    assert all(
        1 > m["given/rank 1"] >= m["given/rank 2"] >= 0 and "given/rank 4" not in m for m in metrics
    )  # rank 4 is the server's: nothing is cut
    assert (
        metrics[0]["given/rank 1"] == 0 < metrics[1]["given/rank 1"]
    )  # an adapter begins with a product of zero


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_what_would_change_the_base_is_carried_as_rank_of_a_stock_adapter(
    rule: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, events, _ = played(tiny_bert, data, tmp_path, rule, extra=8)
    state = states(folder, 3)
    assert any(np.any(value != 0) for name, value in state.shared.items() if ".residual_A" in name)
    assert (
        next(e.metrics["error"] for e in events if isinstance(e, RoundDone)) < 1e-6
    )  # four clients of rank 2 fit into 8
    recipe = small.recipe(tiny_bert, data, aggregate={"rule": rule, "extra": 8})
    method = recipe.method.build(3, recipe.aggregate)
    workspace = build_workspace(recipe, method, ClientStates(None), lambda event: None)
    method.install(state, workspace.tunable)
    batch = {name: value for name, value in workspace.test().collate([0, 1, 2]).items() if name != "labels"}
    with torch.no_grad():
        want = workspace.tunable.net(**batch).logits
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    stock = PeftModel.from_pretrained(base, folder.adapter).eval()
    assert stock.peft_config["default"].r == 10
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_carried_slices_do_not_train(tiny_bert: Path, data: Path) -> None:
    """The first three slices of five stay as they are to the bit under AdamW; the others move."""
    from fedtune.model.fit import fit
    from fedtune.model.tunable import attach

    recipe = small.recipe(tiny_bert, data)
    workspace = build_workspace(
        recipe, recipe.method.build(3, Mean()), ClientStates(None), lambda event: None
    )
    tunable = attach(workspace.base, recipe.method.adapter, 1)  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    own = tunable.read()
    residual = {}
    for name in factors(own, A):
        module = name.removesuffix(A)
        residual[f"{module}.residual_A"] = np.float32(rng.normal(size=(3, own[name].shape[1])))
        residual[f"{module}.residual_B"] = np.float32(rng.normal(size=(own[module + B].shape[0], 3)))
    resize(tunable, 5, 2.0)
    tunable.write(stack(own, residual, 2.0))
    before = tunable.read()
    with training_only(tunable, set(tunable.named), 3):
        fit(tunable, workspace.train(0), recipe.method.train, 5)  # type: ignore[union-attr]
    after = tunable.read()
    for name in factors(before, A):
        np.testing.assert_array_equal(after[name][:3], before[name][:3])
        np.testing.assert_array_equal(after[name.replace(A, B)][:, :3], before[name.replace(A, B)][:, :3])
        assert np.any(unstack(after, 3)[name.replace(A, B)] != unstack(before, 3)[name.replace(A, B)])


def test_a_resized_pair_is_the_product_at_its_scale(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data)
    workspace = build_workspace(
        recipe, recipe.method.build(3, Mean()), ClientStates(None), lambda event: None
    )
    rng = np.random.default_rng(0)
    resize(workspace.tunable, 3, 0.5)
    values = {
        name: np.float32(rng.normal(size=value.shape)) for name, value in workspace.tunable.read().items()
    }
    workspace.tunable.write(values)
    name = next(name for name in sorted(values) if name.endswith("query.lora_A.weight"))
    layer = workspace.tunable.net.get_submodule(name.removesuffix(A))
    x = torch.randn(2, layer.weight.shape[1])
    with torch.no_grad():
        want = (
            x @ layer.base_layer.weight.T
            + layer.base_layer.bias
            + 0.5 * (x @ torch.from_numpy(values[name]).T @ torch.from_numpy(values[name.replace(A, B)]).T)
        )
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    resize(workspace.tunable, 2, 8.0)
    assert {value.shape[0] for value in factors(workspace.tunable.read(), A).values()} == {2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregate": {"rule": "flexlora"}, "method__adapter": {"kind": "bias"}}, "kind = 'lora'"),
        ({"method__lora_rank_by_client": [1, 2]}, "flexlora, flora, hetlora"),
        ({"method__lora_rank_by_client": [0]}, "not positive"),
        ({"aggregate": {"rule": "fair"}, "method__server": {"optimizer": "sgd"}}, "mean or ffa"),
        ({"aggregate": {"rule": "fedex"}, "method__train": {"weight_decay": 0.1}}, "wear down"),
        ({"aggregate": {"rule": "mean", "extra": 8}}, "aggregate.extra"),
        ({"aggregate": {"rule": "nonsense"}}, "flexlora"),
        ({"aggregate": {"rule": "krum"}}, "4 answers per round.*at least 5"),
        (
            {"aggregate": {"rule": "trimmed"}},
            "4 answers per round for aggregate.trim = 0.2.*would be a plain mean",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused_with_a_way_out(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=words):
        small.recipe(tiny_bert, data, **changes)


def test_fedsb_sends_r_squared_numbers_and_leaves_a_stock_adapter(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, events, _ = played(tiny_bert, data, tmp_path, "fedsb")
    state = states(folder, 3).shared
    cores = factors(state, ".lora_R.weight")
    assert {value.shape for value in cores.values()} == {(2, 2)} and len(cores) == len(factors(state, A))
    up = {e.round: e.up_bytes for e in events if isinstance(e, ClientDone) and e.client == 1}
    first = sum(4 * value.size for name, value in state.items() if name.endswith((A, B)))
    assert up[1] - up[2] == pytest.approx(first - 16 * len(cores), abs=8)
    module = next(iter(cores)).removesuffix(".lora_R.weight")
    stored = next(iter(folder.adapter.glob("*.safetensors")))
    exported = load_file(stored)
    want = state[module + B].astype(np.float64) @ state[module + ".lora_R.weight"] @ state[module + A]
    np.testing.assert_allclose(
        exported[module + B].astype(np.float64) @ exported[module + A], want, rtol=1e-5, atol=1e-8
    )
    assert not factors(exported, ".lora_R.weight")


@pytest.mark.parametrize("rule", mostly_thorough(["mean", "ffa", "fedex", "fedsb"], ["mean"]))
def test_an_export_of_another_rank_is_the_best_one_and_says_what_it_lost(
    rule: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Rank 10 holds all of it; rank 1 loses what the singular values beyond the first say."""
    more = {"extra": 8} if rule == "fedex" else {}
    folder, _, _ = played(tiny_bert, data, tmp_path, rule, **more)
    assert export_run(folder, "adapter", tmp_path / "wide", 10) < 1e-6
    lost = export_run(folder, "adapter", tmp_path / "thin", 1)
    whole, cut = (
        load_file(tmp_path / "wide" / "adapter_model.safetensors"),
        load_file(tmp_path / "thin" / "adapter_model.safetensors"),
    )
    assert json.loads((tmp_path / "thin" / "adapter_config.json").read_text())["r"] == 1
    off = total = 0.0
    for name in factors(cut, A):
        values = np.linalg.svd(whole[name.replace(A, B)].astype(np.float64) @ whole[name], compute_uv=False)
        off, total = off + float(np.sum(values[1:] ** 2)), total + float(np.sum(values**2))
    assert lost == pytest.approx(np.sqrt(off / total), rel=1e-4, abs=1e-7)
    with pytest.raises(FedtuneError, match="M306"):
        export_run(
            played(tiny_bert, data, tmp_path / "bias", "mean", method__adapter={"kind": "bias"})[0],
            "adapter",
            tmp_path / "no",
            4,
        )


MIXED = sorted(name for name in RULES if RULES[name].mixed)


@pytest.mark.parametrize("rule", mostly_thorough(MIXED, ["flora", "hetlora"]))
def test_a_federation_of_ranks_2_and_4_runs_under_every_rule_that_is_allowed_for_it(
    rule: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Each is given and sends its own rank, both rounds learn, and what is left is a stock adapter of the
    server's rank (plus what is carried)."""
    more = {
        "method__lora_rank_by_client": [2, 4],
        "method__adapter": {"kind": "lora", "rank": 4},
        "partition__clients": 5,
        "rounds": 2,
    }
    folder, events, result = played(
        tiny_bert, data, tmp_path, rule, **more, **({"extra": 8} if RULES[rule].carries else {})
    )
    up = {(e.round, e.client): e.up_bytes for e in events if isinstance(e, ClientDone)}
    assert len(up) == 10 and result["left_out"] == 0
    small_ranks, great_ranks = (
        {up[number, client] for number in (1, 2) for client in clients} for clients in ((0, 2, 4), (1, 3))
    )
    assert max(small_ranks) < min(great_ranks)
    state = states(folder, 2).shared
    assert {value.shape[0] for value in factors(state, A).values()} == {4}
    assert any(np.any(value != 0) for name, value in state.items() if name.endswith((B, ".residual_B")))
    rank = {
        value.shape[0]
        for name, value in load_file(next(iter(folder.adapter.glob("*.safetensors")))).items()
        if name.endswith(A)
    }
    assert rank == {12 if RULES[rule].carries else 4}


@pytest.mark.parametrize("rule", sorted(name for name in RULES if not RULES[name].mixed))
def test_other_rules_refuse_clients_of_different_ranks(rule: str, tiny_bert: Path, data: Path) -> None:
    said = (
        f"C104: found clients of different ranks or alphas with aggregate.rule = '{rule}'.*clipped, fedex, "
        "flexlora, flora, hetlora, krum, median, trimmed"
    )
    with pytest.raises(FedtuneError, match=said):
        small.recipe(tiny_bert, data, aggregate={"rule": rule}, method__lora_rank_by_client=[2, 4])
