"""What a session sends: bytes, prompts at the cut, rows that come down, samples that go up once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtune.split.channel import Socket
from fedtune.split.codec import Coding
from fedtune.split.cut import Side
from fedtune.split.micro import Micro, Wishes
from fedtune.split.pipeline import train
from fedtune.split.service import Service
from fedtune.split.session import Tokens
from fedtune.split.stream import Stream
from tests.split.link import Link
from tests.split.plain import (
    KEY,
    OFFER,
    PROMPTS,
    WIDTH,
    Batch,
    Model,
    batches,
    listening,
    near,
    opened,
    served,
    split_step,
    turn,
)
from tests.split.test_stream import LENGTH, MICROS, ROWS

TOKENS = ROWS * (LENGTH + PROMPTS)  # 256 of width 16: 16 KiB of float32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def step_bytes(wishes: dict[str, Any]) -> tuple[int, int, int, int]:
    """Bytes of a step of four micro-batches: of frames up and down, and of the socket up and down."""
    with listening() as (_, dial):
        link = Link(dial.port)
        stream, model, todo = (
            opened(lambda: Socket(f"127.0.0.1:{link.port}"), **wishes),
            Model(),
            batches(MICROS, rows=ROWS, length=LENGTH),
        )
        split_step(model, stream, todo)
        before = stream.sent, stream.received, link.up, link.down
        split_step(model, stream, todo)
        after = stream.sent, stream.received, link.up, link.down
        stream.close()
        link.close()
    return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("lean", "coding", "width"),
    [
        (False, Coding("fp32"), 4),
        (True, Coding("fp32"), 4),
        (True, Coding("fp16"), 2),
        (False, Coding("int8", 0), 1 + 2 / WIDTH),
    ],
)
def test_bytes_are_those_of_the_formula(lean: bool, coding: Coding, width: float) -> None:
    """Up: hidden states and gradients, and the hidden states again unless lean, with a byte a token for the
    mask and 4 for positions each
    time. Down: activations and gradients. 100 bytes a frame are 0.1 % of the 100 KB that a real micro-batch
    has."""
    up, down, socket_up, socket_down = step_bytes({"lean": lean, "coding": coding})
    side, hidden = TOKENS * (1 + 4), TOKENS * WIDTH * width
    says = 1 if lean else 2
    formula_up, formula_down = MICROS * (says * (hidden + side) + hidden), MICROS * 2 * hidden
    assert 0 <= up - formula_up <= 2 * MICROS * 50 and 0 <= down - formula_down <= 2 * MICROS * 50
    assert up <= socket_up <= up + 2 * MICROS * 150 and down <= socket_down <= down + 2 * MICROS * 150


class Wide:
    """A body that changes nothing, for counting."""

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        return hidden

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        return grad


@pytest.mark.parametrize("lean", [False, True])
def test_bytes_of_a_real_size_are_within_a_thousandth(lean: bool) -> None:
    """Four micro-batches of 8 x 205 tokens of width 768, like a ViT-B's with prompts: 5 MB each, in parts of
    1 MiB."""
    offer = replace(OFFER, width=768)
    service = Service(Wide(), offer, Tokens(KEY).admit)
    stream = Stream(near(service), offer, turn(), Wishes(Coding("fp32"), 4, lean=lean))
    micros = [Micro(torch.ones(8, 205, 768, requires_grad=True)) for _ in range(4)]
    train(stream, micros, lambda micro: micro, lambda micro, hidden: hidden.sum())
    formula = 4 * 2 * 8 * 205 * 768 * 4
    again = 0 if lean else formula // 2
    assert (
        0 <= stream.sent - formula - again < 0.001 * formula
        and 0 <= stream.received - formula < 0.001 * formula
    )


def smashed(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """What enters at the cut where prompts do: the frozen head's output of the text alone."""
    return model.first(model.embed(ids), Side()).detach()


def slim_parts(model: Model, rows: str, ids: list[int] | None = None) -> tuple[Any, Any]:
    """Head and tail with prompts at the cut; the tail reads one row of every example."""

    def head(batch: Batch) -> Micro:
        tokens = batch[0].shape[1] + PROMPTS
        chosen = (
            {"row": 0}
            if rows == "row"
            else {"rows": torch.arange(len(batch[0])) * tokens}
            if rows == "rows"
            else {}
        )
        named = [int(value) for value in batch[0][:, 0] * 100 + batch[0][:, 1]] if ids is not None else ()
        if ids is not None:
            ids.extend(named)
        return Micro(lambda: smashed(model, batch[0]), batch[1], model.prompts, 0, samples=named, **chosen)

    def tail(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        first = hidden[:, 0] if rows == "all" else hidden
        return torch.nn.functional.cross_entropy(model.tail(first), batch[2]) / MICROS

    return head, tail


def naive(model: Model, todo: list[Batch]) -> list[float]:
    losses = []
    for ids, side, labels in todo:
        hidden = torch.cat([model.prompts.expand(len(ids), -1, -1), smashed(model, ids)], 1)
        loss = torch.nn.functional.cross_entropy(model.tail(model.body(hidden, side)[:, 0]), labels) / MICROS
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("rows", ["all", "row", "rows"])
@pytest.mark.parametrize("lean", [False, True])
def test_prompts_at_the_cut_and_rows_that_come_down(rows: str, lean: bool) -> None:
    """The prompts' gradient is summed at the service; nothing else of the body's input comes down."""
    todo, whole, model = batches(MICROS, rows=3), Model(), Model()
    wanted = naive(whole, todo)
    with listening() as (_, dial):
        stream = opened(dial, prompts=PROMPTS, lean=lean)
        assert train(stream, todo, *slim_parts(model, rows)) == wanted
        stream.close()
    for mine, theirs in zip(model.trained, whole.trained, strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_samples_are_sent_once_and_again_where_they_were_lost() -> None:
    """Twelve samples: 12 x 6 x 16 numbers once; then each step sends prompts and 12 gradient rows, and the
    gradients are the same."""
    todo, model, whole = batches(MICROS, rows=3), Model(), Model()
    service, ids = served(), list[int]()
    stream = opened(near(service), prompts=PROMPTS, lean=True, cache=True)
    head, tail = slim_parts(model, "row", ids)
    before = stream.sent, stream.received
    train(stream, todo, head, tail)
    first = stream.sent - before[0]
    train(stream, todo, head, tail)
    second, down = stream.sent - before[0] - first, (stream.received - before[1]) // 2
    assert len(set(ids)) == 12 and first - second == 12 * 6 * WIDTH * 4 + MICROS * 11  # 11: a header
    side, frames = 3 * 9 * 5, 8 * 60
    assert (
        0 < second - MICROS * (PROMPTS + 3) * WIDTH * 4 - MICROS * side < frames
        and 0 < down - MICROS * (PROMPTS + 3) * WIDTH * 4 < frames
    )
    stream.close()
    stream = Stream(near(service), OFFER, turn(), stream.wishes, held=stream.held)  # the next round's
    before = stream.sent, stream.received
    train(stream, todo, head, tail)
    assert stream.sent - before[0] == second and not service.errors
    for key in list(service.held.entries):
        service.held.drop(key)  # as after a restart
    train(stream, todo, head, tail)
    assert service.errors == {"S713": 4} and stream.again == 4
    for _ in range(4):
        wanted = naive(whole, todo)
    assert wanted == train(opened(near(service), prompts=PROMPTS), todo, *slim_parts(Model(), "row"))
    assert all(
        torch.equal(mine.grad, theirs.grad) for mine, theirs in zip(model.trained, whole.trained, strict=True)
    )


def text_micro(
    model: Model, ids: torch.Tensor, lengths: list[int], samples: list[int], told: list[int]
) -> Micro:
    """Texts of these lengths, padded to the longest; what the head computes is noted in `told`."""
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(torch.uint8)
    own = torch.stack(
        [
            torch.cat([ids[n, :length], torch.zeros(longest - length, dtype=torch.long)])
            for n, length in enumerate(lengths)
        ]
    )

    def hidden() -> torch.Tensor:
        told.extend(samples)
        return model.first(model.embed(own), Side(mask)).detach()

    return Micro(
        hidden,
        Side(torch.cat([mask.new_ones(len(mask), PROMPTS), mask], 1)),
        model.prompts,
        0,
        row=0,
        samples=samples,
    )


def test_padded_samples_come_back_in_other_company() -> None:
    """Texts of 6, 3 and 5 tokens, sent two by two, then in a batch of the two shorter ones: padded to 5, no
    longer to 6, nothing is sent again
    and the answer is that of the text sent whole. A text that changed its length under the same id is asked
    for again."""
    model, told, service = Model(), list[int](), served()
    ids = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    stream = opened(near(service), prompts=PROMPTS, cache=True)

    def ask(lengths: list[int], samples: list[int], through: Stream = stream) -> torch.Tensor:
        through.forward(text_micro(model, ids[samples], lengths, samples, told))
        answer = through.answer()
        through.done(answer.sequence)
        return answer.value

    ask([6, 3], [0, 1])
    ask([5, 6], [2, 0])
    assert told == [0, 1, 2, 0]
    again = ask([3, 5], [1, 2])
    assert told == [0, 1, 2, 0] and not service.errors
    assert torch.allclose(
        again, ask([3, 5], [1, 2], opened(near(served()), prompts=PROMPTS)), rtol=0, atol=1e-6
    )
    told.clear()
    ask([4, 5], [1, 2])
    assert told == [1, 2] and service.errors == {"S713": 1}
