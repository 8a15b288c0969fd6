"""A step through head, socket, body, socket and tail against the whole model: loss, prompts' and tail's
gradients differ by nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fedtune.split import row_selection
from fedtune.split.body import Frozen
from fedtune.split.channel import Local, Socket
from fedtune.split.codec import Coding
from fedtune.split.cut import Cut, Side
from fedtune.split.grpc_server import serve
from fedtune.split.micro import Micro, Turn, Wishes
from fedtune.split.parts import Part
from fedtune.split.pipeline import infer, train
from fedtune.split.prompts import insert_labels, longer
from fedtune.split.service import Service
from fedtune.split.session import Offer, Tokens
from fedtune.split.stream import Stream
from tests.marks import mostly_thorough
from tests.split import oracle
from tests.split.families import WIDTH, batch, make

P, LAYERS, MICROS = 8, 5, 4
FAMILIES = ["llama", "qwen3 sliding", "gpt2", "bert", "vit"]
Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def deep(name: str) -> Any:
    return make(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": LAYERS})


def micro_batches(name: str) -> list[Batch]:
    """Four, of different examples and numbers of them; texts are padded."""
    made = []
    for number in range(MICROS):
        inputs = batch(name, rows=2 + number % 2)
        if "input_ids" in inputs:
            inputs["input_ids"] = torch.where(
                inputs["attention_mask"] == 1, (inputs["input_ids"] + 7 * number) % 90 + 3, 0
            )
            if inputs["labels"].ndim == 2:
                inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        else:
            inputs["pixel_values"] = inputs["pixel_values"] + number
        made.append(inputs)
    return made


def some_prompts() -> torch.Tensor:
    return (torch.randn(P, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.5).requires_grad_()


def head_of(part: Part, prompts: torch.Tensor, position: str) -> Any:
    def head(inputs: Batch) -> Micro:
        given = {key: value for key, value in inputs.items() if key != "labels"}
        if position == "input":
            hidden, side = part.head(given, prompts)
            return Micro(hidden, side)
        with torch.no_grad():
            hidden, side = part.head(given)
        return Micro(hidden, longer(side, P, part.place), prompts, part.place)

    return head


def tail_of(part: Part) -> Any:
    def tail(inputs: Batch, hidden: torch.Tensor) -> torch.Tensor:
        labels = inputs["labels"]
        mask = inputs.get("attention_mask")
        side = longer(Side(None if mask is None else mask.to(torch.uint8)), P, part.place)
        loss, _ = part.tail(
            hidden, side, insert_labels(labels, P, part.place) if labels.ndim == 2 else labels
        )
        assert loss is not None
        return loss / MICROS

    return tail


@contextmanager
def through_a_socket(net: Any, cut: Cut, **terms: Any) -> Iterator[Stream]:
    offer, tokens = Offer("tiny", "00" * 32, cut.k, cut.m, WIDTH), Tokens()
    service = Service(Frozen(Part(net, cut, ("body",))), offer, tokens.admit).start()
    server, port = serve(service, "127.0.0.1:0")
    stream = Stream(
        lambda: Socket(f"127.0.0.1:{port}"),
        offer,
        Turn("run", 1, 0, tokens.issue("run", 1, 0)),
        Wishes(Coding("fp32"), 4, **terms),
    )
    try:
        yield stream
    finally:
        stream.close()
        service.stop()
        server.stop(0.2).wait()


@pytest.mark.parametrize("position", ["cut", "input"])
@pytest.mark.parametrize("k", mostly_thorough([0, 1, 2], [1]))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_over_a_socket_equals_the_whole_models(name: str, k: int, position: str) -> None:
    whole, todo, wanted = deep(name), micro_batches(name), some_prompts()
    losses = []
    for inputs in todo:
        loss, _ = (
            oracle.at_input(name, whole, inputs, wanted)
            if position == "input"
            else oracle.at_cut(name, whole, inputs, wanted, k)
        )
        (loss / MICROS).backward()
        losses.append(float(loss.detach() / MICROS))
    part, prompts = Part(deep(name), Cut(k, LAYERS - k)), some_prompts()
    with through_a_socket(
        deep(name), part.cut, prompts=P if position == "cut" else 0, masked=name != "vit"
    ) as stream:
        assert train(stream, todo, head_of(part, prompts, position), tail_of(part)) == losses
        activations: list[torch.Tensor] = []
        infer(
            stream, todo, head_of(part, prompts, position), lambda inputs, hidden: activations.append(hidden)
        )
    assert wanted.grad is not None and wanted.grad.norm() > 0
    assert torch.equal(prompts.grad, wanted.grad)
    whole_tail, output = dict(whole.named_parameters(remove_duplicate=False)), whole.get_output_embeddings()
    tied = output is not None and output.weight is whole.get_input_embeddings().weight
    compared = 0
    for key, value in part.parameters("tail").items():
        if value.grad is not None and not (
            tied and value is part.net.get_output_embeddings().weight
        ):  # a tied matrix has the embeddings' gradient too
            assert torch.equal(value.grad, whole_tail[key].grad), key
            compared += 1
    assert compared >= 2
    with torch.no_grad():
        for inputs, hidden in zip(todo, activations, strict=True):
            micro = head_of(part, prompts, position)(inputs)
            loss = tail_of(part)(inputs, hidden)
            assert torch.isfinite(loss) and hidden.shape[1] == micro.hidden.shape[1] + (
                P if position == "cut" else 0
            )


@pytest.mark.parametrize(
    "name", mostly_thorough(["bert", "vit", "llama", "llama classifier"], ["bert", "llama"])
)
def test_slim_over_a_socket_equals_naive(name: str) -> None:
    """Prompts at the cut, only the rows that come down which the tail reads, samples sent once: over three
    steps the same losses and gradients."""
    todo, cut, results = micro_batches(name), Cut(1, LAYERS), []
    for lean in (False, True):
        part, prompts = Part(deep(name), cut), some_prompts()
        kind = row_selection.rows_needed(part) if lean else "all"
        assert kind == ({"llama": "each", "llama classifier": "last"}.get(name, "first") if lean else "all")

        def head(
            inputs: Batch,
            part: Part = part,
            prompts: torch.Tensor = prompts,
            kind: Any = kind,
            lean: bool = lean,
        ) -> Micro:
            given = {key: value for key, value in inputs.items() if key != "labels"}
            with torch.no_grad():
                hidden, side = part.head(given)
            full = longer(side, P, part.place)
            labels = (
                insert_labels(inputs["labels"], P, part.place)
                if inputs["labels"].ndim == 2
                else inputs["labels"]
            )
            rows = (
                row_selection.pick(kind, full, labels, (len(hidden), hidden.shape[1] + P))
                if lean and kind != "first"
                else None
            )
            number = next(n for n, each in enumerate(todo) if each is inputs)
            samples = range(10 * number, 10 * number + len(hidden)) if lean else ()
            return Micro(hidden, full, prompts, part.place, 0 if kind == "first" else None, rows, samples)

        def tail(inputs: Batch, down: torch.Tensor, part: Part = part, kind: Any = kind) -> torch.Tensor:
            if kind == "all":
                return tail_of(part)(inputs, down)  # type: ignore[no-any-return]
            labels = (
                insert_labels(inputs["labels"], P, part.place)
                if inputs["labels"].ndim == 2
                else inputs["labels"]
            )
            loss, _ = row_selection.tail_rows(part, down, kind, row_selection.targets(kind, labels))
            assert loss is not None
            return loss / MICROS

        with through_a_socket(deep(name), cut, prompts=P, lean=lean, cache=lean) as stream:
            losses = [loss for _ in range(3) for loss in train(stream, todo, head, tail)]
        results.append(
            (
                losses,
                prompts.grad,
                {key: value.grad for key, value in part.parameters("tail").items() if value.grad is not None},
            )
        )
    (wanted, grad, grads), (losses, mine, others) = results
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-6
    assert (
        grad.norm() > 0 and torch.allclose(mine, grad, rtol=1e-5, atol=1e-7) and grads.keys() == others.keys()
    )
    assert all(torch.allclose(others[key], value, rtol=1e-5, atol=1e-7) for key, value in grads.items())
    if name in ("bert", "vit"):  # a row is a row; a language model's loss sums rows in another order
        assert losses == wanted and torch.equal(mine, grad)


def test_slim_is_forty_times_leaner_on_a_vit_for_digits() -> None:
    """32 images of 17 tokens of width 64 and 8 prompts: 4 x 32 x 25 x 64 numbers of 4 bytes against 2 x (8 +
    32) x 64."""
    offer, tokens = Offer("vit", "00" * 32, 1, 6, 64), Tokens()
    net = make("vit", hidden_size=64, num_hidden_layers=6, image_size=8, patch_size=2, num_channels=1)
    service, part = Service(Frozen(Part(net, Cut(1, 6))), offer, tokens.admit), Part(net, Cut(1, 6))
    images, labels = (
        torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(32) % 5,
    )
    prompts = torch.zeros(P, 64, requires_grad=True)
    hidden = part.head({"pixel_values": images})[0].detach()
    wishes = Wishes(Coding("fp32"), 4, lean=True, cache=True, prompts=P)
    stream = Stream(lambda: Local(service), offer, Turn("run", 1, 0, tokens.issue("run", 1, 0)), wishes)
    spent = []
    for _ in range(2):
        before = stream.sent + stream.received
        train(
            stream,
            [0],
            lambda _: Micro(hidden, Side(), prompts, 1, 0, samples=range(32)),
            lambda _, rows: row_selection.tail_rows(part, rows, "first", labels)[0],
        )
        spent.append(stream.sent + stream.received - before)
    naive, formula = 4 * 32 * 25 * 64 * 4, 2 * (8 + 32) * 64 * 4
    assert naive == 40 * formula and 0 <= spent[1] - formula <= 0.01 * formula
    assert abs(spent[0] - spent[1] - 32 * 17 * 64 * 4) < 20


@pytest.mark.parametrize("wrong", ["mask", "positions", "layers"])
def test_what_is_wrong_shows(wrong: str) -> None:
    """The equality above means something: without its mask, with shifted positions or other layers the loss
    is another one."""
    part, todo, prompts = Part(deep("llama"), Cut(1, 4)), micro_batches("llama")[:1], some_prompts()
    right, head, tail = [], head_of(part, prompts, "input"), tail_of(part)

    def spoiled(inputs: Batch) -> Micro:
        micro = head(inputs)
        if wrong == "mask":
            return Micro(
                micro.hidden, Side(torch.ones_like(micro.side.mask).index_fill_(1, torch.tensor([0]), 0))
            )
        return (
            Micro(micro.hidden, Side(micro.side.mask, torch.arange(20).expand(2, -1) * 2))
            if wrong == "positions"
            else micro
        )

    with through_a_socket(deep("llama"), Cut(1, 4)) as stream:
        infer(stream, todo, head, lambda inputs, hidden: right.append(float(tail(inputs, hidden))))
    with through_a_socket(deep("llama"), Cut(1, 4) if wrong != "layers" else Cut(2, 5)) as stream:
        infer(stream, todo, spoiled, lambda inputs, hidden: right.append(float(tail(inputs, hidden))))
    assert abs(right[0] - right[1]) > 1e-5
