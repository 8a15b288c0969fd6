"""How many experts live in a block, and a router over experts that live in some blocks only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.experts.gate_table import GateTable
from fedtune.experts.leaving import drop
from fedtune.experts.routers import LIVING, PREFIX, SETTINGS, Routing, loaded, router
from fedtune.experts.shapes import SHAPES, Where, counts, in_turns, living
from fedtune.experts.trained import apart, balanced, gates_of, stacked, start
from fedtune.rng import stream

FIRST, SECOND = (f"model.layers.{n}.mlp.down_proj" for n in (0, 1))
WHERE = {"a": (FIRST, SECOND), "b": (FIRST, SECOND), "c": (SECOND,)}
IDS = torch.arange(3, 17).reshape(2, 7)
Expert = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def net(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def experts(net: Any, where: dict[str, tuple[str, ...]] = WHERE) -> dict[str, Expert]:
    made: dict[str, Expert] = {}
    for number, (name, layers) in enumerate(where.items()):
        draw, rank = stream("expert of some layers", number), 2 + number
        made[name] = {}
        for layer in layers:
            rows, columns = net.get_submodule(layer).weight.shape
            made[name][f"{PREFIX}{layer}.lora_A.weight"] = np.float32(draw.normal(size=(rank, columns)))
            made[name][f"{PREFIX}{layer}.lora_B.weight"] = np.float32(0.2 * draw.normal(size=(rows, rank)))
    return made


def gates(net: Any, null: bool = False) -> Any:
    """Drawn, one row for each expert that lives in a layer."""
    draw, said = stream("gates of some layers", 1), {}
    for layer, count in ((FIRST, 2), (SECOND, 3)):
        width = net.get_submodule(layer).weight.shape[1]
        said[f"gate/{PREFIX}{layer}.weight"] = np.float32(draw.normal(size=(count + null, width)))
        said[f"gate/{PREFIX}{layer}.bias"] = np.float32(draw.normal(size=count + null))
    return gates_of(said, of_prefix=True)


def answer(net: Any, made: Any, **more: Any) -> torch.Tensor:
    made.attach(net)
    try:
        with torch.no_grad():
            found: torch.Tensor = net(input_ids=IDS, **more).logits
    finally:
        made.detach()
    return found


@pytest.mark.parametrize("least", [1, 2])
def test_every_shape_has_as_many_in_all_and_gives_experts_the_same_number_of_blocks(least: int) -> None:
    for shape in SHAPES:
        for many in (1, 2, 3, 5, 8, 17):
            for blocks in (2, 3, 4, 12, 33):
                made = counts(shape, many, blocks, least)
                assert sum(made) == max(min(least, many) * blocks, round(many * blocks * 5 / 8))
                assert min(made) >= min(least, many) and max(made) <= many
                has = [sum(n in who for who in in_turns(made, many)) for n in range(many)]
                assert max(has) - min(has) <= 1 <= min(has)


def test_shapes_are_molas() -> None:
    """At 32 blocks and 8 experts, each quarter of the depth has the paper's number."""
    for shape, quarters in SHAPES.items():
        assert counts(shape, 8, 32, 2) == [number for number in quarters for _ in range(8)]
    for few in (counts("inverted", 4, 12, 2), counts("triangle", 4, 12, 2)[::-1]):
        assert sum(few[:6]) < sum(few[6:]) and few[0] == 2


def test_layers_of_a_block_go_together_and_the_rest_with_the_last() -> None:
    layers = ["h.10.q", "h.2.q", "h.2.down", "pooler", "h.0.q", "h.1.q"]
    who = living(layers, 4, "inverted", 2)
    assert who["h.2.q"] == who["h.2.down"] and who["pooler"] == who["h.10.q"]
    assert [len(who[f"h.{n}.q"]) for n in (0, 1, 2, 10)] == counts("inverted", 4, 4, 2)
    assert set(living(layers, 3, "whole", 2).values()) == {(0, 1, 2)}


@pytest.mark.parametrize("keep", ["topk", "topp", "dense"])
def test_a_layer_sums_the_experts_that_live_there(net: Any, keep: Any) -> None:
    made, routing = experts(net), Routing("trained", keep, 2, 0.5)
    held = router(made, {}, routing, True, gates=gates(net))
    x = torch.from_numpy(np.float32(stream("x", 1).normal(size=(2, 4, held.layers[FIRST].A.shape[1]))))
    for layer, who in ((FIRST, "ab"), (SECOND, "abc")):
        shares = routing.shares(held._scores(held.layers[layer], held.gates[layer], x))
        assert shares.shape[-1] == len(who)
        held.layers[layer].summed = held.layers[layer].tokens = 0.0
        want = torch.zeros(2, 4, held.layers[layer].B.shape[0])
        for place, name in enumerate(who):
            a, b = (torch.from_numpy(made[name][f"{PREFIX}{layer}.lora_{side}.weight"]) for side in "AB")
            want += shares[..., place : place + 1] * (x @ a.T @ b.T)
        got = held._at(held.layers[layer])(net.get_submodule(layer), (x,), torch.zeros_like(want))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert held.health.even == pytest.approx([8 * (1 / 2 + 1 / 3)] * 2 + [8 / 3])


def test_experts_that_are_alike_where_they_live_give_the_answer_of_all_of_them(net: Any) -> None:
    one = experts(net)["a"]
    some = {"a": one, "b": one, "c": {name: value for name, value in one.items() if SECOND in name}}
    alone = router({"a": one}, {}, Routing("fixed", "dense"), True, mixture={"a": 1.0})
    for routing in (Routing("trained", "topk", 2), Routing("trained", "topp", p=0.5)):
        got = answer(net, router(some, {}, routing, True, gates=gates(net)))
        torch.testing.assert_close(got, answer(net, alone), rtol=1e-4, atol=1e-5)


def test_generating_with_a_cache_and_without_agrees_and_a_saved_router_says_the_same(
    net: Any, tmp_path: Path
) -> None:
    made = experts(net)
    held = router(made, {}, Routing("trained", "topk", 2), True, gates=gates(net, null=True), null=True)
    held.attach(net)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    said = [net.generate(input_ids=IDS, use_cache=cached, **how) for cached in (True, False)]
    held.detach()
    assert torch.equal(*said)
    held.save(tmp_path)
    assert f'"{LIVING}"' in (tmp_path / SETTINGS).read_text()
    assert torch.equal(answer(net, loaded(tmp_path, made, {})), answer(net, held))
    assert drop(tmp_path, "c")
    left = loaded(tmp_path, {name: made[name] for name in "ab"}, {})
    assert [len(left.gates[layer].weight) for layer in (FIRST, SECOND)] == [3, 3]
    torch.testing.assert_close(left.gates[SECOND].weight, held.gates[SECOND].weight[[0, 1, 3]])


def test_experts_travel_as_one_pair_a_layer_and_come_apart_again(net: Any) -> None:
    made, who = experts(net), {PREFIX + FIRST: (0, 1), PREFIX + SECOND: (0, 1, 2)}
    whole = stacked({name: made[name] for name in "cab"})
    assert whole[f"{PREFIX}{FIRST}.lora_A.weight"].shape[0] == 5
    for number, some in apart(whole, [2, 3, 4], who).items():
        name = "abc"[int(number)]
        assert some.keys() == made[name].keys()
        assert all(np.array_equal(some[tensor], made[name][tensor]) for tensor in some)


def test_a_gate_starts_from_the_inputs_of_those_who_live_there() -> None:
    draw, inputs = stream("inputs", 1), {}
    for name in "abc":
        mean = draw.normal(size=4)
        inputs[name] = {layer: np.stack([mean, mean**2 + 1]) for layer in ("p", "q")}
    sizes = {"p": (4, 2), "q": (4, 2)}

    def begun(names: str, living: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        where = Where(living, tuple(living))
        return start(list(names), {name: inputs[name] for name in names}, sizes, where, False)

    all_of = begun("abc", {"p": (0, 1, 2), "q": (0, 1, 2)})
    some = begun("abc", {"p": (0, 1, 2), "q": (0, 2)})
    two = begun("ac", {"q": (0, 1)})
    np.testing.assert_array_equal(some["gate/p.weight"], all_of["gate/p.weight"])
    np.testing.assert_array_equal(some["gate/q.weight"], two["gate/q.weight"])


def test_the_localised_term_is_of_layers_where_the_own_expert_lives() -> None:
    term = balanced(GateTable(rounds=1, localized=0.5), np.array([0, 0, 1], np.float32))
    assert term is not None
    part, real = torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 1)
    assert float(term(part, part, real, (0, 1))) == 0
    assert float(term(part, part, real, (0, 2))) == pytest.approx(0.5 * 0.01)  # of 1/0.9 and 1/1.1, cv is 0.1
