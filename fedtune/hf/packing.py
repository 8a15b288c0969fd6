"""Several texts in one row of a batch, none of which sees another.

A transformers model can be told so in two ways: by positions that begin again, after which it makes its own
masks (those of sliding windows, too), or by a mask of blocks. Which of them a model heeds, if any, is tried:
recurrent models and those with ALiBi heed none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
from transformers import masking_utils

from fedtune.hf.draws import own_draws
from fedtune.hf.probe import differ, other, said, texts

Way = Literal["positions", "mask", "none"]
WINDOWS = ("sliding_window", "attention_chunk_size")  # of a configuration; a mask of blocks would undo them
MOVED = 0.1  # of the slack for another batch: rows of the same shape, in which only a neighbour changes


def arguments(owners: torch.Tensor, way: Way, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What says to a network which text each token is of: `owners` (rows, tokens), in pieces without gaps; -1
    is padding behind them. position_ids (rows, tokens), and, by mask, attention_mask (rows, 1, tokens,
    tokens), which is added to scores."""
    place = torch.arange(owners.shape[1], device=owners.device).expand_as(owners)
    begins = torch.diff(owners, prepend=owners[:, :1] - 1) != 0
    positions = place - torch.where(begins, place, 0).cummax(1).values
    known = {"position_ids": torch.where(owners < 0, 0, positions)}
    if way == "positions":
        return known
    seen = (owners[:, :, None] == owners[:, None, :]) & (place[:, :, None] >= place[:, None, :])
    scores = torch.zeros(seen.shape, dtype=dtype, device=owners.device)
    return known | {"attention_mask": scores.masked_fill(~seen, torch.finfo(dtype).min)[:, None]}


@contextmanager
def rows_of_one_text() -> Iterator[None]:
    """Passes in which each row is one text, and nothing is padded. Without a mask transformers looks at every
    row's positions for texts that begin in it, and waits for a GPU to say that there are none."""
    known = ONE_TEXT.set(True)
    try:
        spare_the_look()
        yield
    finally:
        ONE_TEXT.reset(known)


ONE_TEXT = ContextVar("each row of a pass is one text", default=False)


@cache
def spare_the_look() -> None:
    """Put the answer that is known in front of transformers' own function. A release without it keeps its
    way."""
    look = getattr(masking_utils, "find_packed_sequence_indices", None)
    if look is None:
        return

    def found(positions: torch.Tensor) -> Any:
        return None if ONE_TEXT.get() else look(positions)

    masking_utils.find_packed_sequence_indices = found


def way_of(net: Any, tokenizer: Any, context: int | None) -> Way:
    """The first way in which two short texts in one row score as they do alone, and in which neither moves
    when the other one changes. Eval mode; nothing is drawn and nothing changes."""
    short, long = texts(tokenizer, context)
    long = long[: (context or 1 << 30) - len(short) - 1]
    if len(short) < 2 or len(long) < 2:
        return "none"
    with own_draws(device=next(net.parameters()).device), torch.inference_mode(False), torch.no_grad():
        for way in ways(net.config.get_text_config()):
            try:
                if heeds(net, tokenizer, way, long, short):
                    return way
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                continue  # a network that takes no such argument
    return "none"


def ways(config: Any) -> tuple[Way, ...]:
    return ("positions",) if any(getattr(config, name, None) for name in WINDOWS) else ("positions", "mask")


def heeds(net: Any, tokenizer: Any, way: Way, first: list[int], second: list[int]) -> bool:
    slack = 1e-3 if next(net.parameters()).dtype == torch.float32 else 0.05  # as for padding
    split, pad = len(first), tokenizer.pad_token_id
    alone = [said(net, [row], pad, "right")[0] for row in (first, second)]
    changed = [[other(token, tokenizer) for token in row] for row in (first, second)]
    whole = in_one_row(net, way, first, second)
    moved = [
        in_one_row(net, way, first, changed[1])[:split],
        in_one_row(net, way, changed[0], second)[split:],
    ]
    return not any(
        differ(one, mine, slack) or differ(mine, beside, MOVED * slack)
        for one, mine, beside in zip(alone, (whole[:split], whole[split:]), moved, strict=True)
    )


def in_one_row(net: Any, way: Way, first: list[int], second: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) logits of two texts in a row that ends with padding, on the CPU in float32."""
    device, dtype = next(net.parameters()).device, next(net.parameters()).dtype
    ids = torch.tensor([[*first, *second, first[0]]], device=device)
    owners = torch.tensor([[0] * len(first) + [1] * len(second) + [-1]], device=device)
    logits: torch.Tensor = net(input_ids=ids, use_cache=False, **arguments(owners, way, dtype)).logits
    return logits[0, :-1].float().cpu()
