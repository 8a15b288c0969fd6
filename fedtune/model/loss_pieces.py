"""The loss of a language model without its logits in memory: the output layer is run on the rows that carry a
label, a piece at a time, and again in the backward pass.

Three copies of all logits are most of what a step with a large vocabulary needs: 13.9 of 15.5 GiB for a model
of 0.6 billion parameters and 8 texts of 1,024 tokens. Sums of pieces round otherwise than one sum, so small
batches, whose bits recipes promise, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fedtune.hf.draws import own_draws
from fedtune.model.base import Base
from fedtune.model.objectives.base import IGNORED

PIECE = 256 << 20  # bytes of float32 logits: of one piece, and up to which there are no pieces


def in_pieces(base: Base, rows: int) -> bool:
    """Whether the loss over so many rows is taken in pieces: where their logits are large, and are what the
    output layer says of each row."""
    return 4 * rows * vocabulary(base.net) > PIECE and apart_here(base)


def apart_here(base: Base) -> bool:
    """As `logits_apart`; a base is asked once."""
    if base.logits_apart is None:
        base.logits_apart = logits_apart(base)
    return base.logits_apart


def vocabulary(net: Any) -> int:
    return int(net.config.get_text_config().vocab_size)


def rows_of(net: Any) -> int:
    """Rows in a piece."""
    return max(1, PIECE // (4 * vocabulary(net)))


def logits_apart(base: Base) -> bool:
    """Whether the model answers with what its output layer says, as it is; some scale or cap it afterwards
    (Cohere, Granite, Gemma 2), and then the layer is not all of it. The model is asked, with one token."""
    if base.net.get_output_embeddings() is None:
        return False
    device = base.device
    ids = torch.ones(1, 1, dtype=torch.long, device=device)
    draws = own_draws(device=device)
    with draws, torch.inference_mode(False), torch.no_grad(), before_output(base.net) as heard:
        logits = base.net(input_ids=ids, use_cache=False).logits
    return len(heard) == 1 and logits is heard[0][0] and logits._version == heard[0][1]


@contextmanager
def before_output(net: Any) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """Forward passes that end in front of the output layer: their "logits" are the hidden states that it
    would have been given. Yields them as they come, each with its count of changes in place."""
    layer, heard = net.get_output_embeddings(), list[tuple[torch.Tensor, int]]()
    own = vars(layer).copy()  # somebody else's forward, put on it as this one is

    def same(hidden: torch.Tensor) -> torch.Tensor:
        heard.append((hidden, 0 if hidden.is_inference() else hidden._version))
        return hidden

    layer.forward = same
    try:
        yield heard
    finally:
        del layer.forward
        vars(layer).update(own)


def summed_in_pieces(net: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy in float32 over the labels (examples, tokens) that are not -100, from the
    hidden states (examples, tokens, width) in front of the output layer."""
    at = (labels != IGNORED).flatten().nonzero().flatten()
    rows, wanted = hidden.flatten(0, 1)[at], labels.flatten()[at]
    layer, size = net.get_output_embeddings(), rows_of(net)

    def loss(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(wide(layer(part)), target, reduction="sum")

    total = wide(rows.new_zeros(()))
    for part, target in zip(rows.split(size), wanted.split(size), strict=True):
        total = total + again(loss, part, target)
    return total


def likely_in_pieces(net: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N,) log p in float32 of the labels (..., tokens) that are not -100, in their order, from the hidden
    states (texts, tokens, width) in front of the output layer."""
    at = (labels != IGNORED).flatten().nonzero().flatten()
    rows, wanted = hidden.flatten(0, 1)[at], labels.flatten()[at]
    layer, size = net.get_output_embeddings(), rows_of(net)

    def likely(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -cross_entropy(wide(layer(part)), target, reduction="none")

    pieces = zip(rows.split(size), wanted.split(size), strict=True)
    return torch.cat([again(likely, part, target) for part, target in pieces])


def again(work: Any, *given: torch.Tensor) -> torch.Tensor:
    """A piece of work that is done once more in the backward pass instead of being kept in memory."""
    done = checkpoint(work, *given, use_reentrant=False) if torch.is_grad_enabled() else work(*given)
    return cast(torch.Tensor, done)


def wide(value: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return value if value.dtype == torch.float64 else value.float()
