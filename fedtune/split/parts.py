"""A part of a transformer, run by the model's OWN forward.

A head is stopped when block k is about to be called. Body and tail are given inputs of the right shape and no
content, pass over the blocks
before their own, take the received hidden state at their first block, and go on. So attention masks,
positions, rotary angles, sliding windows
and pooling are always made by the model's code, and nothing of it is written twice.

What a call needs travels in a context variable, never on a module: one Part serves any number of threads, the
network below it still answers
ordinary calls, and several parts may lie on one network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from fedtune.hf.pooling import Pooling
from fedtune.hf.statistics import freeze_statistics
from fedtune.split.anatomy import Anatomy, blank, look
from fedtune.split.cut import ROLES, Cut, Role, Side
from fedtune.split.patching import NOW, Block, Call, Front, Reached, mark_part
from fedtune.split.prompts import insert, longer


class Part:
    """The parts of one model that a party holds.

    Made on a network in memory, whole or loaded by `load.load_part`, with or without peft around it; no
    weights are copied, and adapters may be
    put on and taken off later. Head and body are never in training mode: `train` concerns the tail.
    Raises S701 (cut does not fit, model cannot be cut) and S704 (rows would mix).
    """

    def __init__(
        self,
        net: Any,
        cut: Cut,
        holds: Collection[Role] = ROLES,
        anatomy: Anatomy | None = None,
        fresh: frozenset[str] = frozenset(),
    ) -> None:
        """`fresh` names parameters that no file holds: a new task head."""
        self.net, self.fresh = unwrap(net), fresh
        self.pooling: Pooling = "own"  # as its base's; hooks on the network do it
        self.anatomy = anatomy or look(type(self.net), self.net.config)
        cut.check(self.anatomy.blocks)
        self.cut, self.holds = cut, frozenset(holds)
        self.base = self.net.get_submodule(self.anatomy.base)
        self.layers = self.net.get_submodule(self.anatomy.layers)
        self.blocks, self.width, self.place = self.anatomy.blocks, self.anatomy.width, self.anatomy.place
        decoder = self.place == 0 and not self.anatomy.image
        self.quiet = {"use_cache": False} if decoder else {}  # a cache is of no use here and costs memory
        for number, path in enumerate(self.anatomy.front):
            mark_part(self.net.get_submodule(path), Front, number, self.anatomy)
        for number, block in enumerate(self.layers):
            mark_part(block, Block, number, self.anatomy)
        self.net.eval()

    @property
    def reference(self) -> torch.Tensor:
        """Some parameter of the part."""
        return next(iter(self.net.parameters()))

    @property
    def dtype(self) -> torch.dtype:
        return next((value.dtype for value in self.layers.parameters()), self.reference.dtype)

    @property
    def device(self) -> torch.device:
        return self.reference.device

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Name in the network -> parameter of one part; one tied between head and tail belongs to both."""
        own = [f"{self.anatomy.layers}.{number}" for number in self.cut.span(role, self.blocks)]
        own += {"head": self.anatomy.front, "body": (), "tail": self.anatomy.rear}[role]
        return {
            name: value
            for name, value in self.net.named_parameters(remove_duplicate=False)
            if any(name.startswith(path + ".") for path in own)
        }

    def train(self, on: bool = True) -> None:
        """Training mode (dropout) for the tail; head and body stay in eval mode, so that what passes the cut
        is a function of the input."""
        self.net.eval()
        if on:
            for path in self.anatomy.rear:
                self.net.get_submodule(path).train()
            for child in self.net.children():  # a classifier's dropout stands beside the backbone
                if child is not self.base:
                    child.train()
            for number in self.cut.span("tail", self.blocks):
                self.layers[number].train()
            freeze_statistics(self.net)

    # --- what each party calls ---

    def head(
        self, inputs: Mapping[str, torch.Tensor], prompts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Side]:
        """A batch without labels -> (hidden (B, T, d), side). Prompts (P, d) here enter at the input; for the
        cut see `prompts.insert`.

        Raises S701 for prompts at the input of a model whose embeddings are narrower than its blocks.
        """
        self.need("head")
        given, side = self.entering(inputs, prompts)
        return self.run(
            Call(stop=self.cut.k, prompts=prompts), lambda: self.base(**given, **self.quiet)
        ), side

    def body(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        """(B, T, d) -> (B, T, d), with a graph only where `hidden` asks for one."""
        self.need("body")
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.requires_grad):
            return self.through_body(hidden, side, False)

    def body_backward(
        self, hidden: torch.Tensor, side: Side, grad: torch.Tensor, blockwise: bool = False
    ) -> torch.Tensor:
        """Gradient behind the body -> gradient in front of it, (B, T, d) both. Nothing is kept between calls:
        the forward is done again.

        `blockwise` keeps the activations of one block instead of all (transformers' own checkpointing is
        silently off in eval mode).
        """
        self.need("body")
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            return torch.autograd.grad(self.through_body(leaf, side, blockwise), leaf, grad)[0]

    def tail(
        self, hidden: torch.Tensor, side: Side, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(B, T, d) -> (the model's own loss where labels are given, logits)."""
        self.need("tail")
        answers = {} if labels is None else {"labels": labels}
        output = self.run(
            self.entered(hidden, self.cut.m, None), lambda: self.net(**self.dummy(hidden, side), **answers)
        )
        return output.loss, output.logits

    def shortcut(
        self, inputs: Mapping[str, torch.Tensor], prompts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Head straight into tail -> logits. Prompts (P, d) enter where head and tail meet."""
        hidden, side = self.head(inputs)
        if prompts is not None:
            hidden, side = insert(hidden, side, prompts, self.place)
        return self.tail(hidden, side)[1]

    def backbone_tail(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        """The tail without the task head: what the backbone answers last, (B, T, d). For self-tests."""
        self.need("tail")
        output = self.run(
            self.entered(hidden, self.cut.m, None), lambda: self.base(**self.dummy(hidden, side))
        )
        return output.last_hidden_state

    # --- how ---

    def need(self, role: Role) -> None:
        if role not in self.holds:
            raise RuntimeError(f"this party holds {', '.join(sorted(self.holds))}, not the {role}")

    def run(self, call: Call, forward: Callable[[], Any]) -> Any:
        """A forward under a call: its output, or the hidden state where it was to stop."""
        token = NOW.set(call)
        try:
            output = forward()
        except Reached as reached:
            return reached.hidden
        finally:
            NOW.reset(token)
        if call.stop is not None:
            raise RuntimeError("the forward never came to the cut")
        return output

    def entered(self, hidden: torch.Tensor, start: int, stop: int | None, blockwise: bool = False) -> Call:
        return Call(range(start), start, hidden, (hidden.shape[0], hidden.shape[1]), stop, None, blockwise)

    def through_body(self, hidden: torch.Tensor, side: Side, blockwise: bool) -> torch.Tensor:
        if self.layers[self.cut.k].training:
            raise RuntimeError(
                "a body in training mode would drop out at random; call part.train() instead of net.train()"
            )
        call = self.entered(hidden, self.cut.k, self.cut.m, blockwise)
        return self.run(call, lambda: self.base(**self.dummy(hidden, side)))

    def entering(
        self, inputs: Mapping[str, torch.Tensor], prompts: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], Side]:
        """The head's arguments (with prompts, longer ones), and what goes through the cut beside its
        answer."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        side = Side(None if mask is None else mask.to(torch.uint8), positions, self.last_token(inputs))
        if prompts is None:
            return dict(inputs), side
        side = longer(side, len(prompts), self.place)
        given = dict(inputs)
        if side.mask is not None:
            given["attention_mask"] = side.mask.long()
        if (
            side.positions is not None and self.place == 0
        ):  # an encoder's belong to its embeddings, where the prompts are not yet
            given["position_ids"] = side.positions
        elif (
            self.net.config.model_type == "modernbert"
        ):  # but this one's are rotary, and counted before the prompts are there
            rows, tokens = inputs["input_ids"].shape
            given["position_ids"] = torch.arange(tokens + len(prompts), device=self.device).expand(rows, -1)
        return given, side

    def last_token(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The token that a generative classifier reads, found as transformers does: the rightmost that is not
        padding."""
        pad = self.net.config.get_text_config().pad_token_id if self.reads_last else None
        if pad is None:
            return None
        ids = inputs["input_ids"]
        return (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(-1)

    @property
    def reads_last(self) -> bool:
        """Whether this is a classifier on a decoder."""
        return (
            self.place == 0
            and not self.anatomy.image
            and self.net.get_output_embeddings() is None
            and bool(self.anatomy.base)
        )

    def dummy(self, hidden: torch.Tensor, side: Side) -> dict[str, Any]:
        """Inputs of the shape of a hidden state; a generative classifier finds its last token in the ids, so
        they are made to show it."""
        rows, tokens = hidden.shape[:2]
        given: dict[str, Any] = {
            **blank(self.net.config, self.anatomy.image, rows, tokens, hidden.device),
            **self.quiet,
        }
        if self.anatomy.image:
            return given
        pad = self.net.config.get_text_config().pad_token_id
        if pad is not None:
            content = 1 if pad != 1 else 0
            real = (
                torch.ones(rows, tokens, dtype=torch.bool, device=hidden.device)
                if side.mask is None
                else side.mask.bool()
            )
            if side.last is not None:
                real = torch.arange(tokens, device=hidden.device) <= side.last[:, None]
            given["input_ids"] = torch.where(real, content, pad)
        if side.mask is not None:
            given["attention_mask"] = side.mask.long()
        if side.positions is not None:
            given["position_ids"] = side.positions.long()
        return given


def unwrap(net: Any) -> Any:
    """The transformers network inside a peft wrapper."""
    while hasattr(net, "get_base_model"):
        net = net.get_base_model()
    return net
