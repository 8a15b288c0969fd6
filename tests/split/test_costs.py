"""Formulas of costs against torch's own counter and against figures known for ViT-B/16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch.utils.flop_counter import FlopCounterMode

from fedtune.split.costs import Mode, costs, step_bytes
from fedtune.split.cut import Cut, Side
from fedtune.split.parts import Part
from tests.split.families import FAMILIES, LAYERS, WIDTH, batch, make

DIGITS = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_labels": 5,
}
ViT = T.ViTForImageClassification


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def counted(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bert", "vit", "llama classifier", "gpt_neox", "distilbert", "qwen3_moe"]
)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    net, inputs = make(name, attn_implementation="eager"), batch(name, rows=1)
    if name == "qwen3_moe":
        net.set_experts_implementation("eager")  # the counter does not know grouped products
    inputs.pop("attention_mask", None)
    given = {key: value for key, value in inputs.items() if key != "labels"}
    tokens = 17 if name == "vit" else 12
    cut = Cut(1, 3)
    sizes = costs(type(net), net.config, cut, tokens=tokens, batch=1, prompts=0, mode="naive").sizes
    part = Part(net, cut)
    hidden = torch.randn(1, tokens, WIDTH)
    angles = (
        0
        if name not in ("llama", "llama classifier", "gpt_neox", "qwen3_moe")
        else counted(lambda: net.base_model.rotary_emb(hidden, torch.arange(tokens)[None]))
    )
    with torch.no_grad():
        assert counted(lambda: part.head(given)) - angles == sizes["head"].forward
        assert counted(lambda: part.body(hidden, Side())) - angles == sizes["body"].forward
        assert counted(lambda: part.tail(hidden, Side())) - angles == sizes["tail"].forward
    net.requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    assert (
        counted(lambda: part.body(leaf, Side()).backward(hidden)) - angles
        == sizes["body"].forward + sizes["body"].through
    )
    net.requires_grad_(True)
    assert (
        counted(lambda: part.tail(leaf, Side())[1].sum().backward()) - angles
        == sizes["tail"].forward + sizes["tail"].trained
    )


def test_a_client_of_the_vit_for_digits_does_a_sixth_of_the_work() -> None:
    """Prompts at the input; against full fine-tuning without prompts. By the formula and by torch's counter,
    both."""
    for cut, share in ((Cut(1, 6), 0.172), (Cut(1, 5), 0.422)):
        config = T.ViTConfig(**DIGITS, attn_implementation="eager")
        known = costs(ViT, config, cut, tokens=17, batch=32, prompts=8, position="input")
        assert abs(known.share_flops - share) < 0.005
        net = ViT(config)
        pixels = torch.randn(1, 1, 8, 8)
        whole = counted(lambda net=net, pixels=pixels: net(pixel_values=pixels).logits.sum().backward())
        part = Part(net, cut)
        for value in part.parameters("head").values():
            value.requires_grad_(False)

        def client(part: Part = part, pixels: torch.Tensor = pixels) -> None:
            prompts = torch.randn(8, 64, requires_grad=True)
            hidden, side = part.head({"pixel_values": pixels}, prompts)
            hidden.sum().backward()
            part.tail(torch.randn(1, 25, 64, requires_grad=True), side)[1].sum().backward()

        assert abs(counted(client) / whole - known.share_flops) < 1e-3


def test_a_client_without_blocks_does_next_to_nothing_on_vit_b() -> None:
    """0.2 % a pass, which is how SFPrompt's 0.46 % can be; one block makes it 6 %, and prompts at the cut,
    which need no backward there, halve that."""
    config = T.ViTConfig(num_labels=100)
    known = {
        k: costs(ViT, config, Cut(k, 12), tokens=197, batch=32, prompts=5, position=at)
        for k, at in ((0, "input"), (1, "input"))
    }
    assert 0.002 < known[0].share_flops < 0.003 and 0.055 < known[1].share_flops < 0.061
    lean = costs(ViT, config, Cut(1, 12), tokens=197, batch=32, prompts=5, position="cut")
    assert 0.029 < lean.share_flops < 0.031
    assert (
        abs(known[0].share_parameters - 0.0095) < 0.001
        and known[0].sizes["body"].parameters == 12 * 7_087_872
    )


def test_break_even_with_federated_fine_tuning_of_vit_b() -> None:
    """85.9 M values of 4 bytes down and up, 344 MB each, against 2.48 MB a sample: 277 samples; 1,000 or so
    where rows alone come down."""
    config = T.ViTConfig(num_labels=100)
    whole = 2 * 344_000_000

    def samples(mode: Mode) -> float:
        cost = costs(
            ViT, config, Cut(0, 12), tokens=197, batch=32, prompts=5, position="cut", mode=mode, number=4
        )
        return cost.break_even(32, whole, 2 * 4 * cost.trained)

    assert abs(samples("naive") - 277) < 2
    assert 1000 < samples("slim") < 1150
    assert (
        costs(ViT, config, Cut(0, 12), tokens=197, batch=32, prompts=10, mode="cached", number=4).up
        == 129_024
    )
    assert sum(step_bytes("naive", 32, 197, 768, 4, 10, 32)) == 81_395_712  # 315 times 2 * 129,024


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_language_models_tail_works_on_label_rows_and_tied_values_count_once(name: str) -> None:
    net = make(name)
    cost = costs(type(net), net.config, Cut(1, LAYERS), tokens=12, batch=4, prompts=3, labelled=5)
    every = sum(value.numel() for value in net.parameters())
    part = Part(net, Cut(1, LAYERS))
    own = {id(value): value.numel() for role in ("head", "tail") for value in part.parameters(role).values()}  # type: ignore[arg-type]
    assert abs(cost.share_parameters - sum(own.values()) / every) < 1e-9
    rows = 4 * 5 if FAMILIES[name][0] == "lm" else 4
    assert cost.down == (3 + rows) * WIDTH * 2 and cost.up == cost.down + 4 * 12 * WIDTH * 2
