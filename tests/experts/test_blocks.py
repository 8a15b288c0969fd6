"""Experts of feed-forward blocks behind one gate: MixLoRA's formula, written out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from fedtune.errors import FedtuneError
from fedtune.experts.feed_forward import blocks
from fedtune.experts.routers import PREFIX, Router, Routing, loaded, router
from fedtune.experts.shapes import where
from fedtune.experts.trained import gates_of
from fedtune.rng import stream

LLAMA, BERT = ("gate_proj", "up_proj", "down_proj"), ("intermediate.dense", "output.dense")
IDS = torch.arange(3, 17).reshape(2, 7)
Expert = dict[str, np.ndarray]
KEEPS: list[Any] = ["topk", "topp", "dense"]


@pytest.fixture(scope="module")
def net(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def sizes_in(net: Any, ends: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in net.named_modules()
        if name.endswith(ends) and "attention" not in name
    }


def experts(net: Any, names: str = "abc", ends: tuple[str, ...] = LLAMA) -> dict[str, Expert]:
    made: dict[str, Expert] = {}
    for number, name in enumerate(names):
        draw, rank, made[name] = stream("expert of a block", number), 2 + number, {}
        for layer, (width, height) in sizes_in(net, ends).items():
            made[name][f"{PREFIX}{layer}.lora_A.weight"] = np.float32(draw.normal(size=(rank, width)))
            made[name][f"{PREFIX}{layer}.lora_B.weight"] = np.float32(0.1 * draw.normal(size=(height, rank)))
    return made


def over(
    net: Any, made: dict[str, Expert], keep: Any, ends: tuple[str, ...] = LLAMA, null: bool = False
) -> Router:
    sizes, draw, said = sizes_in(net, ends), stream("gates of blocks", 1), {}
    for head in sorted(set(blocks(sizes).values())):
        shape = (len(made) + null, sizes[head][0])
        said[f"gate/{PREFIX}{head}.weight"] = np.float32(draw.normal(size=shape))
        said[f"gate/{PREFIX}{head}.bias"] = np.float32(draw.normal(size=shape[0]))
    routing = Routing("trained", keep, 2, 0.6, per="block")
    return router(made, {}, routing, True, null=null, gates=gates_of(said, of_prefix=False))


def answer(net: Any, made: Router | None, **more: Any) -> torch.Tensor:
    if made:
        made.attach(net)
    try:
        with torch.no_grad():
            found: torch.Tensor = net(input_ids=IDS, **more)[0]
    finally:
        if made:
            made.detach()
    return found


def written_out(mlp: Any, layer: str, made: dict[str, Expert], held: Router, x: torch.Tensor) -> torch.Tensor:
    """Every expert's whole block, one after the other, in float64."""
    x = x.double()

    def linear(end: str, name: str, value: torch.Tensor) -> torch.Tensor:
        base, full = getattr(mlp, end).weight.double(), f"{PREFIX}{layer}.{end}"
        if name:
            a, b = (torch.from_numpy(made[name][f"{full}.lora_{side}.weight"]).double() for side in "AB")
            base = base + b @ a
        return value @ base.T

    def block(name: str) -> torch.Tensor:
        wide = torch.nn.functional.silu(linear("gate_proj", name, x)) * linear("up_proj", name, x)
        return linear("down_proj", name, wide)

    gate = held.layers[f"{layer}.gate_proj"].gate
    assert gate is not None
    part = torch.softmax(x @ gate.weight.double().T + gate.bias.double(), -1)
    _, kept, _ = held.routing.parts(part.log().float())
    shares = part * kept / (part * kept).sum(-1, keepdim=True)
    names = [*sorted(made), *([""] if held.null else [])]
    return sum(  # type: ignore[return-value]
        (shares[..., n : n + 1] * block(name) for n, name in enumerate(names)), torch.zeros(())
    )


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_block_answers_as_the_formula_says(net: Any, keep: Any, null: bool) -> None:
    made = experts(net)
    held, layer = over(net, made, keep, null=null), "model.layers.1.mlp"
    mlp = net.get_submodule(layer)
    x = torch.from_numpy(np.float32(stream("x", 1).normal(size=(2, 5, mlp.gate_proj.in_features))))
    want = written_out(mlp, layer, made, held, x)
    held.attach(net)
    try:
        got = mlp(x)
    finally:
        held.detach()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert held.health.tokens == 10  # one decision a token


def test_a_gate_learns_through_the_block_as_through_the_formula(net: Any) -> None:
    made, layer = experts(net), "model.layers.0.mlp"
    held, mlp = over(net, made, "topk"), net.get_submodule("model.layers.0.mlp")
    gate = held.layers[f"{layer}.gate_proj"].gate
    assert gate is not None
    gate.weight.requires_grad_(True)
    x = torch.from_numpy(np.float32(stream("x", 2).normal(size=(2, 5, mlp.gate_proj.in_features))))
    (want,) = torch.autograd.grad(written_out(mlp, layer, made, held, x).square().sum(), gate.weight)
    held.attach(net)
    (got,) = torch.autograd.grad(mlp(x).square().sum(), gate.weight)
    held.detach()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keep", KEEPS)
def test_equal_experts_give_the_answer_of_any_and_one_that_of_its_adapter(net: Any, keep: Any) -> None:
    one = experts(net, "a")["a"]
    alone = router({"a": one}, {}, Routing("fixed", "dense"), True, mixture={"a": 1.0})
    for names in ("a", "abc"):
        got = answer(net, over(net, dict.fromkeys(names, one), keep))
        torch.testing.assert_close(got, answer(net, alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answer(net, alone), answer(net, None), atol=1e-3)


def test_the_order_of_experts_does_not_matter_nor_does_saving(net: Any, tmp_path: Path) -> None:
    made = experts(net)
    held = over(net, made, "topk", null=True)
    want = answer(net, held)
    assert torch.equal(answer(net, over(net, {n: made[n] for n in "cab"}, "topk", null=True)), want)
    held.save(tmp_path)
    assert torch.equal(answer(net, loaded(tmp_path, made, {})), want)


def test_generating_with_a_cache_and_without_agrees(net: Any) -> None:
    held = over(net, experts(net), "topk")
    held.attach(net)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    said = [net.generate(input_ids=IDS, use_cache=cached, **how) for cached in (True, False)]
    held.detach()
    assert torch.equal(*said)


def test_an_encoder_whose_two_layers_lie_apart(tiny_bert: Path) -> None:
    net = AutoModel.from_pretrained(tiny_bert).eval()
    one = experts(net, "a", BERT)["a"]
    alone = router({"a": one}, {}, Routing("fixed", "dense"), False, mixture={"a": 1.0})
    got = answer(net, over(net, dict.fromkeys("ab", one), "topk", BERT))
    torch.testing.assert_close(got, answer(net, alone), rtol=1e-4, atol=1e-5)


def test_blocks_are_known_by_names_and_widths() -> None:
    sizes = {
        f"h.{n}.{end}": size
        for n in (0, 1)
        for end, size in {
            "self_attn.q": (8, 8),
            "mlp.up": (8, 20),
            "mlp.gate": (8, 20),
            "mlp.down": (20, 8),
        }.items()
    }
    assert blocks(sizes) == {
        f"h.{n}.mlp.{end}": f"h.{n}.mlp.gate" for n in (0, 1) for end in ("up", "gate", "down")
    }
    found = where(sizes, 3, "whole", 2, "feed-forward", "block")
    assert found.living["h.0.self_attn.q"] == () and found.living["h.1.mlp.up"] == (0, 1, 2)
    assert sorted(found.gated) == ["h.0.mlp.gate", "h.1.mlp.gate"]
    assert where(sizes, 3, "whole", 2, "feed-forward", "layer").gated == tuple(blocks(sizes))
    for odd, said in (
        ({"h.0.SelfAttention.q": (8, 8)}, "LoRA on no feed-forward layer"),
        ({"h.0.mlp.down": (20, 8)}, "LoRA on h.0.mlp.down of h.0"),
        ({"h.0.mlp.up": (8, 20), "h.0.a.down": (20, 8), "h.0.b.down": (20, 8)}, "LoRA on h.0.mlp.up, "),
    ):
        with pytest.raises(FedtuneError, match=f"M306: .*feed-forward' with {said}"):
            blocks(odd)
