"""One optimizer step through the cut: micro-batches in a pipeline, everything that is summed in their order.

While one micro-batch is in the body, the head works on the next and the tail on the one before. Answers may
come in any order; tails and
heads go backward in the order of the batch, so that the sums of gradients have the same bits whatever the
network did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from fedtune.split.micro import Micro
from fedtune.split.stream import Stream

Batch = TypeVar("Batch")


def train(
    stream: Stream,
    batches: Iterable[Batch],
    head: Callable[[Batch], Micro],
    tail: Callable[[Batch, torch.Tensor], torch.Tensor],
) -> list[float]:
    """Losses of the micro-batches, in order; gradients are added to `.grad` of what head and tail train.

    head  a micro-batch -> what goes through the cut. Where `prompts` or else `hidden` have a graph, their
          gradient is fetched
    tail  a micro-batch and the activations that came down -> its loss, a scalar; divide by the number of
          micro-batches in here
    """
    todo, losses = iter(batches), []
    live: dict[
        int, tuple[Batch, torch.Tensor | None]
    ] = {}  # number -> batch and what its gradient flows into
    activations: dict[int, torch.Tensor] = {}
    gradients: dict[int, torch.Tensor] = {}
    forth, back, more = [], [], True  # numbers in order: tail still to do, head still to go backward
    while more or live:
        while more and stream.room:
            batch = next(todo, None)
            if batch is None:
                more = False
                break
            micro = head(batch)
            number = stream.forward(micro)
            target = micro.prompts if micro.prompts is not None else micro.hidden
            live[number] = (
                batch,
                target if isinstance(target, torch.Tensor) and target.requires_grad else None,
            )
            forth.append(number)
        if not live:
            break
        answer = stream.answer()
        (gradients if answer.backward else activations)[answer.sequence] = answer.value
        while forth and forth[0] in activations:
            number = forth.pop(0)
            batch, target = live[number]
            leaf = activations.pop(number).requires_grad_(target is not None)
            loss = tail(batch, leaf)
            losses.append(float(loss.detach()))
            loss.backward()
            if target is None:
                stream.done(number)
                del live[number]
            else:
                stream.backward(number, leaf.grad)
                back.append(number)
        while back and back[0] in gradients:
            number = back.pop(0)
            _, target = live.pop(number)
            assert target is not None
            target.backward(gradients.pop(number).to(target))
    return losses


def infer(
    stream: Stream,
    batches: Iterable[Batch],
    head: Callable[[Batch], Micro],
    tail: Callable[[Batch, torch.Tensor], object],
) -> None:
    """Activations only, for evaluation and scores: `tail` is called for every micro-batch, in order."""
    todo, live = iter(batches), dict[int, Batch]()
    activations: dict[int, torch.Tensor] = {}
    more = True
    with torch.no_grad():
        while more or live:
            while more and stream.room:
                batch = next(todo, None)
                if batch is None:
                    more = False
                    break
                live[stream.forward(head(batch))] = batch
            if not live:
                break
            answer = stream.answer()
            activations[answer.sequence] = answer.value
            while live and (number := next(iter(live))) in activations:
                tail(live.pop(number), activations.pop(number))
                stream.done(number)
