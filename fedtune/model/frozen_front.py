"""What the blocks in front of the first trained one say of a batch is the same in every state: it is computed
once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.model.blocks import block_list
from fedtune.model.fresh_head import head_children
from fedtune.model.tunable import TunableModel

MOST = 256 << 20  # bytes of hidden states that are kept


@dataclass
class FrozenFront:
    """Hidden states behind the frozen blocks, by batch, of one data set that is scored again and again in
    eval mode. Where the whole model is trained, or anything about it is unusual, nothing is kept."""

    kept: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    size: int = 0

    @contextmanager
    def of(self, tunable: TunableModel, batch: Hashable) -> Iterator[None]:
        """A forward pass of this batch; the second and later ones begin behind the frozen blocks."""
        blocks, first = frozen_blocks(tunable)
        key = (batch, weights_of(tunable, blocks[:first]))
        known = self.kept.get(key)
        if not first or (known is None and self.size > MOST):
            yield
            return
        if known is not None:
            with skipped(blocks[:first], known):
                yield
            return
        with said_by(blocks[first - 1]) as heard:
            yield
        if len(heard) == 1 and isinstance(heard[0], torch.Tensor):
            self.kept[key] = heard[0]
            self.size += heard[0].numel() * heard[0].element_size()


@contextmanager
def said_by(block: Any) -> Iterator[list[Any]]:
    """What a block says in the forward passes meanwhile."""
    heard: list[Any] = []
    handle = block.register_forward_hook(lambda module, args, said: heard.append(said))
    try:
        yield heard
    finally:
        handle.remove()


@contextmanager
def skipped(blocks: Sequence[Any], hidden: torch.Tensor | None = None) -> Iterator[None]:
    """Blocks pass on what they are given, meanwhile, and the last one says the hidden state that is known."""

    def same(hidden_states: Any, *args: Any, **named: Any) -> Any:
        return hidden_states

    def known(*args: Any, **named: Any) -> Any:
        return hidden

    for block in blocks:
        block.forward = known if block is blocks[-1] and hidden is not None else same
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def frozen_blocks(tunable: TunableModel) -> tuple[list[Any], int]:
    """The blocks, and how many of them stand before everything that an adapter has: 0 unless all of that lies
    in later blocks and the task head."""
    net = tunable.base.net
    try:
        blocks = list(block_list(net))
    except FedtuneError:
        return [], 0
    places = {id(value): number for number, block in enumerate(blocks) for value in block.parameters()}
    behind = {id(value) for name in head_children(net) for value in net.get_submodule(name).parameters()}
    own = [*tunable.named.values(), *tunable.still.values()]
    if any(id(value) not in places and id(value) not in behind for value in own):
        return blocks, 0
    first = min((places[id(value)] for value in own if id(value) in places), default=len(blocks))
    unusual = any(block._forward_hooks or block._forward_pre_hooks for block in blocks[:first])
    return blocks, 0 if unusual or tunable.in_cache else first


def weights_of(tunable: TunableModel, front: list[Any]) -> Hashable:
    """What changes when somebody writes into the frozen part: a rule may add to the base's own weights."""
    parts = [tunable.base.net.get_input_embeddings(), *front]
    return tuple((value.data_ptr(), value._version) for part in parts for value in part.parameters())
