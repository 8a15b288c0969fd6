"""How a call of a part reaches the modules of a network: blocks and embeddings become watched parts, which
look at a context variable.

A watched part is the module itself under a subclass of its own class, so that it stands outside of all hooks
(an adapter's, for instance), survives whatever puts a module's attributes back, and without a call in the
context variable does what the module always did.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.errors import FedtuneError
from fedtune.split.anatomy import Anatomy
from fedtune.split.prompts import put_in


@dataclass(frozen=True)
class Call:
    """One call of a part.

    passed     blocks that answer with what they were given
    start      `inject` replaces the hidden state in front of this block (behind the last one, where it is
               their number)
    shape      (rows, tokens) of the hidden state, where the embeddings are not to be made
    stop       the forward ends in front of this block, None to let it run
    prompts    (P, d), put behind the embeddings
    blockwise  keep one block's activations at a time
    """

    passed: range = range(0)
    start: int | None = None
    inject: torch.Tensor | None = None
    shape: tuple[int, int] | None = None
    stop: int | None = None
    prompts: torch.Tensor | None = None
    blockwise: bool = False


NOW: ContextVar[Call | None] = ContextVar("split", default=None)


class Reached(BaseException):
    """The forward came to where it was to stop. A BaseException, which no library catches."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Block:
    """A block: takes the received hidden state, stops the forward, or is passed over."""

    number: int
    anatomy: Anatomy

    def __call__(self, *args: Any, **named: Any) -> Any:
        call, run = NOW.get(), super().__call__  # type: ignore[misc]  # the module's own class comes next
        if call is None:
            return run(*args, **named)
        if self.number == call.start:
            args, named = (
                ((call.inject, *args[1:]), named) if args else (args, {**named, "hidden_states": call.inject})
            )
        hidden = args[0] if args else named["hidden_states"]
        if self.number == call.stop:
            raise Reached(hidden)
        if self.number in call.passed:
            output = (hidden,) if self.anatomy.pairs else hidden
        elif call.blockwise and torch.is_grad_enabled():
            output = checkpoint(run, *args, use_reentrant=False, **named)
        else:
            output = run(*args, **named)
        if self.number < self.anatomy.blocks - 1:
            return output
        if call.start == self.anatomy.blocks:
            output = (call.inject,) if self.anatomy.pairs else call.inject
        if call.stop == self.anatomy.blocks:
            raise Reached(output[0] if isinstance(output, tuple) else output)
        return output


class Front:
    """A module in front of the blocks: computes nothing for a call that enters behind it. Prompts join what
    the first of them, the embeddings, says."""

    number: int
    anatomy: Anatomy

    def __call__(self, *args: Any, **named: Any) -> Any:
        call, run = NOW.get(), super().__call__  # type: ignore[misc]
        if call is not None and call.shape is not None and call.inject is not None:
            return self.blank(call.inject, call.shape, args)
        output = run(*args, **named)
        if call is None or call.prompts is None or self.number:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[-1] != call.prompts.shape[-1]:
            found = f"prompts of width {call.prompts.shape[-1]} among embeddings of width {hidden.shape[-1]}"
            raise FedtuneError(
                "S701", found, "embeddings as wide as the blocks", "let the prompts enter at the cut"
            )
        hidden = put_in(hidden, call.prompts, self.anatomy.place)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def blank(self, like: torch.Tensor, shape: tuple[int, int], args: tuple[Any, ...]) -> Any:
        """Zeros of the hidden state's shape from the embeddings; from what works on them, its input; from
        what is added to them, zero."""
        if not self.number:
            zeros = like.new_zeros(()).expand(*shape, self.anatomy.width)
            return (zeros, *self.anatomy.extras) if self.anatomy.extras is not None else zeros
        if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 3:
            return args[0]
        return like.new_zeros(())


def mark_part(module: nn.Module, kind: type, number: int, anatomy: Anatomy) -> None:
    """Make a module a watched part, under the name of its class; one that is one already is made anew."""
    own = type(module).__bases__[1] if isinstance(module, kind) else type(module)
    module.__class__ = type(
        own.__name__,
        (kind, own),
        {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "number": number,
            "anatomy": anatomy,
        },
    )
