"""Routers against a plain sum over experts; equal experts, any order, a cache of keys and values, disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.aggregate import Pair
from fedtune.errors import FedtuneError
from fedtune.experts.gates import Below, direction
from fedtune.experts.routers import PREFIX, Router, Routing, loaded, router
from fedtune.rng import stream

LAYERS = ("q_proj", "down_proj")
Expert = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def net(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def widths(net: Any) -> dict[str, tuple[int, int]]:
    return {name: tuple(module.weight.shape) for name, module in net.named_modules() if name.endswith(LAYERS)}


def expert(net: Any, number: int, rank: int = 3) -> Expert:
    draw, made = stream("router expert", number), Expert()
    for name, (rows, columns) in widths(net).items():
        made[f"{PREFIX}{name}.lora_A.weight"] = draw.normal(size=(rank, columns)).astype(np.float32)
        made[f"{PREFIX}{name}.lora_B.weight"] = (0.1 * draw.normal(size=(rows, rank))).astype(np.float32)
    return made


def moments(net: Any, names: str) -> dict[str, dict[str, np.ndarray]]:
    draw = stream("router moments", 1)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        for layer, (_, columns) in widths(net).items():
            mean = draw.normal(size=columns).astype(np.float32)
            found.setdefault(name, {})[layer] = np.stack([mean, mean**2 + 4])
    return found


IDS = torch.arange(3, 17).reshape(2, 7)
ROUTINGS = [Routing(gate, keep, 2, 0.5) for gate in ("arrow", "means") for keep in ("topk", "topp", "dense")]
ROUTINGS.append(Routing("means", depth=True))
NAMES = [f"{one.gate} {one.keep}{' by depth' * one.depth}" for one in ROUTINGS]


def answer(net: Any, made: Router | None, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    if made:
        made.attach(net)
    try:
        with torch.no_grad():
            result: torch.Tensor = net(input_ids=ids, **more).logits
    finally:
        if made:
            made.detach()
    return result


def over(
    net: Any, routing: Routing, experts: dict[str, Expert], always: Expert | None = None, **more: Any
) -> Router:
    return router(experts, always or {}, routing, True, moments(net, "".join(experts)), **more)


@pytest.mark.parametrize("routing", ROUTINGS, ids=NAMES)
def test_equal_experts_give_the_answer_of_any_of_them(routing: Routing, net: Any) -> None:
    same = expert(net, 1)
    alone = over(net, Routing("arrow", "dense"), {"a": same})
    torch.testing.assert_close(
        answer(net, over(net, routing, dict.fromkeys("abc", same))), answer(net, alone), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(answer(net, alone), answer(net, None), atol=1e-3)


@pytest.mark.parametrize("routing", ROUTINGS, ids=NAMES)
def test_the_order_of_experts_does_not_matter(routing: Routing, net: Any) -> None:
    made = {name: expert(net, number, rank=2 + number) for number, name in enumerate("abc")}
    backwards = {name: made[name] for name in "cba"}
    said = moments(net, "abc")
    one, two = (router(some, {}, routing, True, said) for some in (made, backwards))
    assert torch.equal(answer(net, one), answer(net, two))
    renamed = {{"a": "z", "b": "b", "c": "c"}[name]: value for name, value in made.items()}
    moved = {{"a": "z", "b": "b", "c": "c"}[name]: value for name, value in said.items()}
    torch.testing.assert_close(
        answer(net, router(renamed, {}, routing, True, moved)), answer(net, one), rtol=1e-4, atol=1e-5
    )


def test_a_layer_adds_the_weighted_sum_of_its_experts_products(net: Any) -> None:
    made = {name: expert(net, number, rank=2 + number) for number, name in enumerate("abc")}
    always, routing = expert(net, 9), Routing("arrow", "topk", 2)
    linear = torch.nn.Linear(widths(net)["model.layers.0.mlp.down_proj"][1], 5)
    held = over(net, routing, made, always)
    layer = held.layers["model.layers.0.mlp.down_proj"]
    x = torch.from_numpy(stream("router x", 1).normal(size=(2, 4, linear.in_features)).astype(np.float32))
    shares = routing.shares(layer.gate(x))
    assert torch.allclose(shares.sum(-1), torch.ones(2, 4)) and int((shares > 0).sum(-1).max()) == 2
    want = torch.zeros(2, 4, widths(net)["model.layers.0.mlp.down_proj"][0])
    for number, tensors in enumerate((always, *made.values())):
        a, b = (
            torch.from_numpy(tensors[f"{PREFIX}model.layers.0.mlp.down_proj.lora_{side}.weight"])
            for side in "AB"
        )
        part = x @ a.T @ b.T
        want = want + (part if number == 0 else shares[..., number - 1 : number] * part)
    got = held._at(layer)(linear, (x,), torch.zeros_like(want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS, ids=NAMES)
def test_generating_with_and_without_a_cache_agrees(routing: Routing, net: Any) -> None:
    made = over(
        net, routing, {name: expert(net, number) for number, name in enumerate("abc")}, expert(net, 9)
    )
    whole = answer(net, made)
    made.attach(net)
    try:
        with torch.no_grad():
            first = net(input_ids=IDS[:, :4], use_cache=True)
            rest = [first.logits]
            for place in range(4, 7):
                step = net(
                    input_ids=IDS[:, place : place + 1], past_key_values=first.past_key_values, use_cache=True
                )
                rest.append(step.logits)
            torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=1e-3, atol=1e-4)
            told = [
                net.generate(
                    input_ids=IDS, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0
                )
                for cached in (True, False)
            ]
    finally:
        made.detach()
    assert torch.equal(*told) and told[0].shape == (2, 15)


def test_padding_on_the_left_changes_nothing(net: Any) -> None:
    made = over(
        net, Routing("means", "topk", 2), {name: expert(net, number) for number, name in enumerate("abc")}
    )
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
    got = answer(net, made, padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    torch.testing.assert_close(got[:, 3:], answer(net, made), rtol=1e-3, atol=1e-4)


def test_means_know_whose_inputs_these_are_and_nobodys_go_to_nobody(net: Any) -> None:
    names = "abc"
    said = moments(net, names)
    made = {name: expert(net, number) for number, name in enumerate(names)}
    held = router(made, {}, Routing("means", "topk", 1), True, said, null=True)
    layer = held.layers["model.layers.0.mlp.down_proj"]
    for number, name in enumerate(names):
        mean = torch.from_numpy(said[name]["model.layers.0.mlp.down_proj"][0])
        assert int(held.routing.shares(layer.gate(mean)).argmax()) == number
    nobody = torch.from_numpy(np.mean([said[name]["model.layers.0.mlp.down_proj"][0] for name in names], 0))
    assert int(held.routing.shares(layer.gate(nobody)).argmax()) == 3
    with pytest.raises(FedtuneError, match="M305: found no mean inputs of expert 'b'"):
        router(made, {}, Routing("means"), True, {"a": said["a"], "c": said["c"]})


def test_by_depth_scores_are_the_mean_over_the_layers_so_far_where_an_expert_lives() -> None:
    draw, below = stream("scores by depth", 1), Below()
    first, second, third = (torch.from_numpy(draw.normal(size=(2, 5, n))) for n in (4, 3, 4))
    assert torch.equal(below.mean_with(first, range(4), 4), first)
    both = below.mean_with(second, (0, 2, 3), 4)  # expert 1 does not live here
    torch.testing.assert_close(both, (first[..., [0, 2, 3]] + second) / 2)
    all_ = below.mean_with(third, range(4), 4)
    torch.testing.assert_close(all_[..., 1], (first[..., 1] + third[..., 1]) / 2)
    torch.testing.assert_close(all_[..., 3], (first[..., 3] + second[..., 2] + third[..., 3]) / 3)
    pooled = torch.ones(2, 4)
    assert torch.equal(below.mean_with(pooled, range(4), 4), pooled)


def test_the_first_direction_of_a_product_is_numpys() -> None:
    draw = stream("direction", 1)
    pair = Pair(draw.normal(size=(9, 3)), draw.normal(size=(3, 7)))
    want = np.linalg.svd(pair.B @ pair.A)[2][0]
    assert abs(float(direction(pair) @ want)) == pytest.approx(1)
    assert not direction(Pair(np.zeros((9, 3)), pair.A)).any()


def test_a_fixed_mixture_is_that_mixture_of_products(net: Any) -> None:
    made = {name: expert(net, number) for number, name in enumerate("ab")}
    half = router(made, {}, Routing("fixed", "dense"), True, mixture={"a": 0.25, "b": 0.75})
    merged = {
        name: np.concatenate([made["a"][name], made["b"][name]], 0)
        if "lora_A" in name
        else np.concatenate([0.25 * made["a"][name], 0.75 * made["b"][name]], 1)
        for name in made["a"]
    }
    alone = router({"m": merged}, {}, Routing("fixed", "dense"), True, mixture={"m": 1.0})
    torch.testing.assert_close(answer(net, half), answer(net, alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS, ids=NAMES)
def test_a_saved_router_gives_the_same_answer(routing: Routing, net: Any, tmp_path: Path) -> None:
    made = {name: expert(net, number) for number, name in enumerate("abc")}
    one = over(net, routing, made, expert(net, 9), null=True)
    one.save(tmp_path)
    assert torch.equal(answer(net, loaded(tmp_path, made, expert(net, 9))), answer(net, one))
    with pytest.raises(FedtuneError, match="M305: found a router over 'b'"):
        loaded(tmp_path, {"a": made["a"], "c": made["c"]}, {})


def test_its_health_says_who_is_asked_and_a_detached_router_leaves_nothing(net: Any) -> None:
    before = answer(net, None)
    made = {name: expert(net, number) for number, name in enumerate("abc")}
    one = router(made, {}, Routing("fixed", "topk", 1), True, mixture={"a": 0.9, "b": 0.1})
    answer(net, one)
    said = one.health.report(one.names)
    assert said["shares"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert (
        said["starved"] == ["b", "c"] and said["collapsed"] and said["entropy"] == pytest.approx(0, abs=1e-6)
    )
    assert torch.equal(answer(net, None), before)
    odd = {name.replace("layers.0", "layers.77"): value for name, value in made["a"].items()}
    with pytest.raises(FedtuneError, match=r"M305: found experts at layer 'model.layers.77"):
        router({"a": odd}, {}, Routing("arrow"), True).attach(net)
