"""Slim U shape: prompts enter at the cut, only the rows that the tail reads come down, and the prompts'
gradient comes down already summed.

A frozen head says the same of a sample for ever, so what it says need not go up again: then a step costs 2 (P
+ R) d numbers instead of
4 B (T + P) d, for P prompts and R rows (B for a classifier on a class token). Loss and gradients are those of
the naive U shape, because it is
the same arithmetic on the same rows.

Rows are named by their place in a hidden state (B, T, d) with its prompts: row b T + t.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from fedtune.split.anatomy import look
from fedtune.split.cut import Cut, Side
from fedtune.split.partial import strip
from fedtune.split.parts import Part

# first: the class token's row alone; last: the last token's; each: any row, for its own logits alone
# (language models); all: every row for every logit
Kind = Literal["first", "last", "each", "all"]


def rows_needed(part: Part) -> Kind:
    """What a tail reads, seen by asking it for gradients. `all` wherever the tail has blocks, since their
    attention mixes rows."""
    if part.cut.m < part.blocks:
        return "all"
    hidden = (
        torch.randn(2, 5, part.width, generator=torch.Generator().manual_seed(0))
        .to(part.device, part.dtype)
        .requires_grad_()
    )
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.uint8, device=part.device)
    with torch.enable_grad():
        logits = part.tail(hidden, Side() if part.anatomy.image else Side(mask))[1]
        wanted = logits[:, 2] if logits.ndim == 3 else logits
        touched = torch.autograd.grad(wanted.float().square().sum(), hidden)[0].abs().sum(-1) > 0  # (2, 5)
    rows = [row.nonzero().flatten().tolist() for row in touched]
    if logits.ndim == 3:
        return "each" if rows == [[2], [2]] else "all"
    return "first" if rows == [[0], [0]] else "last" if rows == [[2], [4]] else "all"


def pooling(net_class: type, config: Any) -> Kind:
    """As `rows_needed` for a tail without blocks, before any weights are there: the task head is made with
    random ones and asked."""
    anatomy = look(net_class, config)
    cut = Cut(0, anatomy.blocks)
    with torch.device("meta"):
        net = net_class(copy.deepcopy(config))
    if anatomy.place == 0 and net.get_output_embeddings() is not None:
        return "each"  # a vocabulary's matrix would be large, and is known to work on each row alone
    strip(net, anatomy, cut, ["tail"])
    net.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(generator=draw)
    return rows_needed(Part(net, cut, ["tail"], anatomy))


def pick(kind: Kind, side: Side, labels: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """Which rows (R,) int64 of a hidden state of `shape` (B, T) come down; `side` and a language model's
    labels (B, T) are those with prompts in them."""
    batch, tokens = shape
    device = next(
        (value.device for value in (side.mask, side.last, labels) if value is not None), torch.device("cpu")
    )
    starts = torch.arange(batch, device=device) * tokens
    if kind == "first":
        return starts
    if kind == "last":
        if side.last is not None:
            return starts + side.last
        if side.mask is None:
            return starts + tokens - 1
        return starts + (torch.arange(tokens, device=device) * (side.mask > 0)).argmax(1)
    if kind == "each" and labels is not None:
        at = (labels[:, 1:] != -100).nonzero()  # sums, since CUDA has no product of integer matrices
        return at[:, 0] * tokens + at[:, 1]
    return torch.arange(batch * tokens, device=device)


def targets(kind: Kind, labels: torch.Tensor) -> torch.Tensor:
    """What the picked rows are to predict, (R,): a language model's next tokens, or the examples' classes."""
    return labels[:, 1:][labels[:, 1:] != -100] if kind == "each" else labels


def take(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(B, T, d) -> (R, d)."""
    return hidden.flatten(0, 1)[rows]


def spread(grad: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Gradients of rows (R, d) -> of the whole hidden state (B, T, d), which is zero elsewhere."""
    whole = grad.new_zeros(shape[0] * shape[1], grad.shape[-1])
    whole[rows] = grad
    return whole.view(*shape, -1)


def tail_rows(
    part: Part, rows: torch.Tensor, kind: Kind, wanted: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The client's tail on rows (R, d) alone -> (mean cross entropy in float32 where targets (R,) are given,
    logits (R, classes or vocabulary))."""
    logits = part.tail(rows[None], Side())[1][0] if kind == "each" else part.tail(rows[:, None], Side())[1]
    return None if wanted is None else cross_entropy(logits.float(), wanted), logits
