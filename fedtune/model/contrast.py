"""Self-contrast of experts (SCMoE, Shi et al. 2024, arXiv:2405.14507): what the experts say whom a gate asks,
moved away from what a single expert says that it leaves out.

    logits = (1 + beta) strong - beta weak,    of tokens with p_strong >= ALPHA max p_strong

Others are not written. Experimental. Both are one network, and one gate that is read in two ways: in the weak
one each token asks the (k+1)-th best expert of a gate that keeps k, the second best under topp and dense, and
the last where there are fewer. A router is fedtune.experts.routers.Router, of a floor above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from fedtune.errors import FedtuneError
from fedtune.model.steering import Reader, refuse_task
from fedtune.model.tunable import TunableModel

ALPHA, BETA = 0.1, 0.5  # the mask and the weight of the authors' code
Prefix = dict[str, tuple[Any, Any]]  # layer -> what its gate has read of a text; "" -> what a pass ahead has


@dataclass(eq=False)
class ContrastedNet:
    """Called, and asked to generate, as the network is. A call gives the logits of all tokens, so that any
    text has a finite loss."""

    tunable: TunableModel
    beta: float

    def __call__(self, **arguments: Any) -> Any:
        said = self.tunable.net(**arguments)
        if self.beta == 0:
            return said
        with weakly(self.tunable.routed, {}):
            weak = self.tunable.net(**arguments).logits
        return SimpleNamespace(logits=moved(said.logits, weak, self.beta))

    def eval(self) -> ContrastedNet:
        self.tunable.net.eval()
        return self

    def generate(self, *, attention_mask: torch.Tensor, **how: Any) -> Any:
        reader = Reader(self.tunable, self.tunable.net, attention_mask)
        steps = [Steps(self.tunable.routed, self.beta, reader)] if self.beta else []
        return self.tunable.net.generate(
            attention_mask=attention_mask, logits_processor=LogitsProcessorList(steps), **how
        )


@dataclass(eq=False)
class Steps(LogitsProcessor):  # type: ignore[misc]
    """The weak pass beside one `generate`, with a cache and a prefix of its own."""

    router: Any
    beta: float
    reader: Reader
    prefix: Prefix = field(default_factory=dict)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with weakly(self.router, self.prefix):
            weak = self.reader(input_ids)
        unlikely = scores < scores.max(-1, keepdim=True).values + math.log(ALPHA)
        return moved(scores, weak, self.beta).masked_fill(unlikely, -torch.inf)


def moved(strong: torch.Tensor, weak: torch.Tensor, beta: float) -> torch.Tensor:
    return (1 + beta) * strong.float() - beta * weak.float()


@contextmanager
def weakly(router: Any, prefix: Prefix) -> Iterator[None]:
    """For a while each token asks one expert that it would not; `prefix` is what gates had read when it was
    last so. What they have read otherwise, and the router's health, stay as they are."""
    held, routing, health = prefix_of(router), router.routing, router.health
    set_prefix(router, prefix)
    router.routing = replace(routing, keep="rank", k=routing.k + 1 if routing.keep == "topk" else 2)
    router.health = replace(health, shares=health.shares * 0, even=health.even * 0)
    try:
        yield
    finally:
        prefix |= prefix_of(router)
        router.routing, router.health = routing, health
        set_prefix(router, held)


def prefix_of(router: Any) -> Prefix:
    read = {name: (layer.summed, layer.tokens) for name, layer in router.layers.items()}
    return read | {"": (router.reading, 0.0)}


def set_prefix(router: Any, prefix: Prefix) -> None:
    for name, layer in router.layers.items():
        layer.summed, layer.tokens = prefix.get(name, (0.0, 0.0))
    router.reading = prefix[""][0] if prefix else type(router.reading)()


def contrasted(tunable: TunableModel, beta: float) -> TunableModel:
    """The model with contrasted logits: what `score` and `generated` take.

    Raises M306 where the task is no language model, and for a model without experts behind a gate.
    """
    refuse_task(tunable.base)
    if tunable.routed is None:
        raise FedtuneError(
            "M306",
            "--steer self for a model without experts behind a gate",
            "a run with [method.experts.gate]",
            "steer a bigger model, or leave --steer out",
        )
    base = copy(tunable.base)
    base.logits_apart = False  # the difference is not what one output layer says
    made = TunableModel(base, tunable.settings, ContrastedNet(tunable, beta), {}, [], tunable.total)
    base.attached = made
    return made
