"""Head, body and tail against the whole model: the same loss, the same gradients, to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
import transformers as T

from fedtune.errors import FedtuneError
from fedtune.split.anatomy import look
from fedtune.split.cut import Cut, Side
from fedtune.split.parts import Part
from fedtune.split.prompts import insert, insert_labels, prompt_grad
from tests.marks import mostly_thorough
from tests.split import oracle
from tests.split.families import FAMILIES, LAYERS, NAMED, WIDTH, batch, make

P = 3
CUTS = [(0, LAYERS), (1, LAYERS - 1), (2, LAYERS - 2), (1, LAYERS)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def some_prompts() -> torch.Tensor:
    return torch.randn(P, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.5


def split_step(
    part: Part, inputs: dict[str, torch.Tensor], prompts: torch.Tensor, position: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One training step as it goes over a wire -> (loss, logits, the prompts' gradient); the tail's gradients
    stay in its parameters."""
    labels = inputs["labels"]
    given = {key: value for key, value in inputs.items() if key != "labels"}
    leaf = prompts.clone().requires_grad_()
    if position == "input":
        hidden, side = part.head(given, leaf)
    else:
        with torch.no_grad():
            smashed, before = part.head(given)
        hidden, side = insert(smashed, before, leaf, part.place)
    if labels.ndim == 2:
        labels = insert_labels(labels, P, part.place)
    side = Side(side.mask, side.positions, side.last)
    up = hidden.detach().clone()
    down = part.body(up, side).detach().clone().requires_grad_()
    loss, logits = part.tail(down, side, labels)
    assert loss is not None
    loss.backward()
    back = part.body_backward(up, side, down.grad)
    hidden.backward(back)
    if position == "cut":
        assert torch.equal(prompt_grad(back, P, part.place), leaf.grad)
    return loss.detach(), logits.detach(), leaf.grad


def grads(net: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}


def check(name: str, k: int, m: int, position: str) -> None:
    net, inputs, prompts = make(name), batch(name), some_prompts()
    reference = make(name)
    leaf = prompts.clone().requires_grad_()
    loss, logits = (
        oracle.at_input(name, reference, inputs, leaf)
        if position == "input"
        else oracle.at_cut(name, reference, inputs, leaf, k)
    )
    loss.backward()
    part = Part(net, Cut(k, m))
    got = split_step(part, inputs, prompts, position)
    assert torch.equal(got[0], loss) and torch.equal(got[1], logits)
    assert leaf.grad.norm() > 0 and torch.equal(got[2], leaf.grad)
    tied = (
        reference.get_output_embeddings() is not None
        and reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    )
    wanted, mine = grads(reference), grads(net)
    compared = 0
    for key in part.parameters("tail"):
        if key in wanted and not (
            tied and wanted[key] is not None and wanted[key].shape[0] == reference.config.vocab_size
        ):
            assert torch.equal(mine[key], wanted[key]), key
            compared += 1
    assert compared >= 2 or tied
    assert not set(part.parameters("body")) & set(mine)


@pytest.mark.parametrize("position", ["cut", "input"])
@pytest.mark.parametrize(("k", "m"), CUTS)
@pytest.mark.parametrize("name", NAMED)
def test_a_split_step_equals_the_whole_models(name: str, k: int, m: int, position: str) -> None:
    check(name, k, m, position)


@pytest.mark.parametrize(
    "name",
    mostly_thorough([name for name in FAMILIES if name not in NAMED], ["qwen3_moe", "gemma3", "dinov2"]),
)
def test_other_families_are_cut_as_well(name: str) -> None:
    for k, m in CUTS:
        for position in ("cut", "input"):
            check(name, k, m, position)


def test_the_network_below_still_answers_ordinary_calls() -> None:
    net, inputs = make("llama"), batch("llama")
    before = net(**inputs).logits
    Part(net, Cut(1, 3))
    assert torch.equal(net(**inputs).logits, before)


def test_two_cuts_lie_on_one_network_without_knowing_of_each_other() -> None:
    net, inputs, prompts = make("bert"), batch("bert"), some_prompts()
    first, second = Part(net, Cut(1, 3)), Part(net, Cut(2, 4))
    a = split_step(first, inputs, prompts, "input")
    b = split_step(second, inputs, prompts, "input")
    assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_many_threads_share_one_part() -> None:
    part = Part(make("qwen3 sliding"), Cut(1, 3))
    draws = [torch.randn(2, 7 + i % 3, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(12)]

    def work(hidden: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(1)
        out = part.body(hidden, Side())
        return torch.stack([out, part.body_backward(hidden, Side(), out)])

    alone = [work(hidden) for hidden in draws]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, draws))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_left_padding_with_positions() -> None:
    net, reference, inputs = make("llama"), make("llama"), batch("llama")
    inputs = {key: value.flip(1) for key, value in inputs.items()}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    leaf = some_prompts().requires_grad_()
    full = oracle.longer("llama", inputs, P)
    full["inputs_embeds"] = oracle.put_in(reference.get_input_embeddings()(full.pop("input_ids")), leaf, 0)
    full["position_ids"] = torch.cat([torch.arange(P).expand(3, -1), inputs["position_ids"] + P], 1)
    loss = reference(**full).loss
    loss.backward()
    got = split_step(Part(net, Cut(1, 3)), inputs, some_prompts(), "input")
    assert torch.equal(got[0], loss) and torch.equal(got[2], leaf.grad)


def test_a_generative_classifier_reads_the_token_that_it_would_read_whole() -> None:
    """Padding is the end-of-text token, which also ends a text: the whole model then reads the token before
    it, whatever the mask says."""
    net, inputs = make("llama classifier"), batch("llama classifier")
    inputs["input_ids"][1, -1] = 0
    with torch.no_grad():
        whole = net(**inputs).logits
        part = Part(net, Cut(1, 3))
        hidden, side = part.head({key: inputs[key] for key in ("input_ids", "attention_mask")})
        assert side.last is not None and side.last.tolist() == [7, 10, 10]
        assert torch.equal(part.tail(part.body(hidden, side), side)[1], whole)


def test_a_wrong_mask_or_wrong_positions_change_the_answer() -> None:
    """What equality means something for: none of these may go unnoticed."""
    part, inputs = Part(make("llama"), Cut(1, 3)), batch("llama")
    hidden, side = part.head({key: inputs[key] for key in ("input_ids", "attention_mask")})
    right = part.body(hidden, side)
    padded = torch.zeros(3, 12, dtype=torch.uint8)
    padded[:, 2:] = 1
    assert not torch.allclose(part.body(hidden, Side(padded)), right)
    assert not torch.allclose(part.body(hidden, Side(side.mask, torch.arange(12).expand(3, -1) * 2)), right)
    other = Part(make("llama"), Cut(2, 4))
    assert not torch.allclose(other.body(hidden, side), right)


def test_the_body_never_drops_out_and_the_tail_may() -> None:
    net = make("bert", hidden_dropout_prob=0.5)
    part, inputs = Part(net, Cut(1, 3)), batch("bert")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    part.train()
    with torch.no_grad():
        (hidden, side), (again, _) = part.head(given), part.head(given)
        assert torch.equal(hidden, again)
        assert torch.equal(part.body(hidden, side), part.body(hidden, side))
        assert not torch.equal(part.tail(hidden, side)[1], part.tail(hidden, side)[1])
        last = Part(make("bert", hidden_dropout_prob=0.5), Cut(1, LAYERS))
        last.train()
        assert not torch.equal(
            last.tail(hidden, side)[1], last.tail(hidden, side)[1]
        )  # the classifier's own dropout
        last.train(False)
        assert torch.equal(last.tail(hidden, side)[1], last.tail(hidden, side)[1])
        net.train()
        with pytest.raises(RuntimeError, match="drop out"):
            part.body(hidden, side)


def test_blockwise_keeps_one_block_and_gives_the_same_gradient() -> None:
    part = Part(make("llama"), Cut(0, 4))
    hidden = torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(0))
    kept = []
    for blockwise in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            kept.append((part.body_backward(hidden, Side(), hidden, blockwise), sum(sizes)))
    assert torch.equal(kept[0][0], kept[1][0])
    assert kept[1][1] < kept[0][1] / 10
    # in eval mode transformers' own switch saves nothing
    part.net.gradient_checkpointing_enable()
    assert torch.equal(part.body_backward(hidden, Side(), hidden), kept[0][0])


def test_lora_in_head_and_tail_trains_as_in_the_whole_model() -> None:
    """peft's wrapper is looked through; adapters put on after the part was made work as well, hooks of whole
    blocks among them."""
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0, 3],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    inputs, results = batch("llama"), []
    for late in (False, True):
        torch.manual_seed(0)
        net = make("llama")
        part = Part(net, Cut(1, 3)) if late else None
        wrapped = peft.get_peft_model(net, config)
        for block in net.model.layers:
            block.register_forward_hook(lambda module, args, output: output * 1.25)
        part = part or Part(wrapped, Cut(1, 3))
        hidden, side = part.head({key: inputs[key] for key in ("input_ids", "attention_mask")})
        down = part.body(hidden.detach(), side).detach().requires_grad_()
        loss, _ = part.tail(down, side, inputs["labels"])
        loss.backward()
        hidden.backward(part.body_backward(hidden.detach(), side, down.grad))
        results.append(
            (
                loss.detach(),
                {name: value.grad for name, value in wrapped.named_parameters() if "lora" in name},
            )
        )
    torch.manual_seed(0)
    net = make("llama")
    whole = peft.get_peft_model(net, config)
    for block in net.model.layers:
        block.register_forward_hook(lambda module, args, output: output * 1.25)
    loss = whole(**inputs).loss
    loss.backward()
    for got, gradients in results:
        assert torch.equal(got, loss) and len(gradients) == 8
        for name, value in whole.named_parameters():
            if "lora" in name:
                assert value.grad.norm() > 0 and torch.equal(gradients[name], value.grad)


def test_the_shortcut_is_the_model_without_its_body() -> None:
    net, inputs = make("vit"), batch("vit")
    short = make("vit")
    short.vit.layers = torch.nn.ModuleList([short.vit.layers[0], *short.vit.layers[3:]])
    with torch.no_grad():
        got = Part(net, Cut(1, 3)).shortcut({"pixel_values": inputs["pixel_values"]})
        assert torch.equal(got, short(pixel_values=inputs["pixel_values"]).logits)


@pytest.mark.parametrize(("k", "m"), [(-1, 2), (2, 2), (3, 2), (1, LAYERS + 1)])
def test_a_cut_outside_the_blocks_is_refused(k: int, m: int) -> None:
    with pytest.raises(FedtuneError, match="S701: found a cut at blocks"):
        Part(make("bert"), Cut(k, m))


def test_models_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(FedtuneError, match=r"S701.*deberta"):
        look(
            T.DebertaV2ForSequenceClassification,
            T.DebertaV2Config(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=50),
        )
    with pytest.raises(FedtuneError, match=r"S704.*capacity"):
        look(T.SwitchTransformersForConditionalGeneration, T.SwitchTransformersConfig())
    with pytest.raises(FedtuneError, match=r"S701.*with 1 blocks"):
        Part(make("bert", num_hidden_layers=1), Cut(0, 1))


def test_the_part_survives_adapters_that_come_and_go() -> None:
    """fedtune's tunable model puts every module's attributes back when it takes an adapter off."""
    net = make("bert")
    before = [(module, dict(vars(module))) for module in net.modules()]
    part = Part(net, Cut(1, 3))
    hidden = torch.randn(1, 4, WIDTH)
    want = part.body(hidden, Side())
    for module, held in before:
        vars(module).clear()
        vars(module).update(held)
    assert torch.equal(part.body(hidden, Side()), want)
    assert type(net.bert.encoder.layer[0]).__name__ == "BertLayer"
