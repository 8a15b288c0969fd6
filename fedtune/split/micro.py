"""What a client hands to its session with the body service, what it gets back, and how it wants to talk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedtune.split.codec import DEFAULT, Coding
from fedtune.split.cut import Side

NOTHING = Side()


@dataclass(frozen=True)
class Wishes:
    """How a client wants to talk.

    coding    of hidden states and gradients, both ways
    window    micro-batches in flight; the service may grant fewer
    lean      the service may hold a micro-batch until its BACKWARD, which then is the gradient alone
    cache     the service may hold the hidden states of samples, so that they are sent once
    prompts   soft prompts that enter at the cut; 0: none, or at the model's input
    masked    every micro-batch has a mask, positioned: has positions; the service refuses one without
    patience  seconds of trying to reach the service again before giving up
    """

    coding: Coding = DEFAULT
    window: int = 8
    lean: bool = False
    cache: bool = False
    prompts: int = 0
    masked: bool = False
    positioned: bool = False
    patience: float = 120.0


WISHES = Wishes()


@dataclass(frozen=True)
class Turn:
    """What the coordinator's message says: which client in which round, and the token that shows it."""

    run: str
    round: int
    client: int
    token: str


@dataclass(frozen=True)
class Micro:
    """What a head gives for a micro-batch.

    hidden   (examples, tokens, width), or how to compute it: not called where the service holds all `samples`
    side     mask and positions, prompts included
    prompts  (prompts, width), put in by the service before place `at` of every example; then the gradient is
             theirs, summed over examples
    row      only this row of every example is needed, None: `rows` flattened and ascending, or all
    samples  ids of the examples, under which the service may hold their hidden states
    """

    hidden: torch.Tensor | Callable[[], torch.Tensor]
    side: Side = NOTHING
    prompts: torch.Tensor | None = None
    at: int = 0
    row: int | None = None
    rows: torch.Tensor | None = None
    samples: Sequence[int] = ()


@dataclass(frozen=True)
class BodyReply:
    """An activation or, `backward`, a gradient; float32 on the CPU."""

    sequence: int
    backward: bool
    value: torch.Tensor
