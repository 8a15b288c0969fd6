"""Slim mode against the naive U shape: fewer bytes, the same numbers."""

from __future__ import annotations

import pytest
import torch

from fedtune.split import costs, row_selection
from fedtune.split.cut import Cut, Side
from fedtune.split.parts import Part
from fedtune.split.prompts import insert, insert_labels, prompt_grad
from tests.split.families import FAMILIES, LAYERS, WIDTH, batch, make
from tests.split.test_cut import P, grads, some_prompts, split_step

READS = {
    "vit": "first",
    "bert": "first",
    "roberta": "first",
    "distilbert": "first",
    "electra": "first",
    "modernbert": "first",
    "deit": "first",
    "dinov2": "all",
    "beit": "all",
    "llama classifier": "last",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_a_tail_reads_is_seen_by_asking_it(name: str) -> None:
    net = make(name)
    kind = READS.get(name, "each")
    assert row_selection.rows_needed(Part(net, Cut(1, LAYERS))) == kind
    assert row_selection.pooling(type(net), net.config) == kind
    assert row_selection.rows_needed(Part(net, Cut(1, LAYERS - 1))) == "all"


def body_rows(
    part: Part, smashed: torch.Tensor, side: Side, prompts: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The server's forward: what the head said (B, T, d), prompts (P, d) -> rows (R, d) behind the body."""
    with torch.no_grad():
        return row_selection.take(part.body(*insert(smashed, side, prompts, part.place)), rows)


def body_rows_backward(
    part: Part,
    smashed: torch.Tensor,
    side: Side,
    prompts: torch.Tensor,
    rows: torch.Tensor,
    grad: torch.Tensor,
) -> torch.Tensor:
    """The server's backward: gradients of the rows (R, d) -> of the prompts (P, d), summed over the batch.
    Nothing is kept from the forward."""
    with torch.no_grad():
        hidden, longer_side = insert(smashed, side, prompts, part.place)
    back = part.body_backward(
        hidden, longer_side, row_selection.spread(grad, rows, (hidden.shape[0], hidden.shape[1]))
    )
    return prompt_grad(back, len(prompts), part.place)


def slim_step(
    part: Part, inputs: dict[str, torch.Tensor], prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(loss, the prompts' gradient, numbers that crossed in this step); what the head says was sent
    before."""
    labels, kind = inputs["labels"], row_selection.rows_needed(part)
    with torch.no_grad():
        cached, side = part.head({key: value for key, value in inputs.items() if key != "labels"})
    hidden, longer = insert(cached, side, prompts, part.place)
    labels = insert_labels(labels, P, part.place) if labels.ndim == 2 else labels
    rows = row_selection.pick(kind, longer, labels, (hidden.shape[0], hidden.shape[1]))
    down = body_rows(part, cached, side, prompts, rows).requires_grad_()
    loss, _ = row_selection.tail_rows(part, down, kind, row_selection.targets(kind, labels))
    assert loss is not None
    loss.backward()
    return (
        loss.detach(),
        body_rows_backward(part, cached, side, prompts, rows, down.grad),
        2 * prompts.numel() + 2 * down.numel(),
    )


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("name", ["vit", "bert", "roberta", "llama classifier", "llama", "gpt2"])
def test_slim_equals_naive(name: str, k: int) -> None:
    """To the bit where the head reads the class token. A decoder's output layer works on every row when
    naive, and on those that count when slim:
    its matrix products sum in another order, so there the gradients agree to 1e-6.
    """
    inputs, prompts = batch(name), some_prompts()
    if name in ("llama", "gpt2"):
        inputs["labels"][:, :6] = -100  # a question, which carries no loss
    naive, lean = make(name), make(name)
    loss, _, wanted = split_step(Part(naive, Cut(k, LAYERS)), inputs, prompts, "cut")
    part = Part(lean, Cut(k, LAYERS))
    got, gradient, numbers = slim_step(part, inputs, prompts)
    a, b = grads(naive), grads(lean)
    assert a.keys() == b.keys() and len(a) >= 2
    rows = int((inputs["labels"][:, 1:] != -100).sum()) if FAMILIES[name][0] == "lm" else 3
    assert numbers == 2 * (P + rows) * WIDTH
    if FAMILIES[name][0] in ("lm", "last"):
        assert torch.allclose(got, loss, rtol=1e-6) and (gradient - wanted).norm() <= 1e-6 * wanted.norm()
        assert all((a[key] - b[key]).norm() <= 1e-6 * a[key].norm() for key in a)
    else:
        assert torch.equal(got, loss) and torch.equal(gradient, wanted)
        assert all(torch.equal(a[key], b[key]) for key in a), [
            key for key in a if not torch.equal(a[key], b[key])
        ]


def test_slim_is_forty_times_leaner_on_a_vit_for_digits() -> None:
    """32 images of 8 x 8 in 16 patches of width 64, 8 prompts: 2 (8 + 32) 64 numbers of 4 bytes a step
    against 4 * 32 * 25 * 64."""
    naive, lean = (
        costs.step_bytes("naive", 32, 17, 64, 4, 8, 32),
        costs.step_bytes("cached", 32, 17, 64, 4, 8, 32),
    )
    assert naive == (409600, 409600) and lean == (10240, 10240)
    assert sum(naive) / sum(lean) == 40
