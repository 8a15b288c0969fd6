"""What a cut costs, by formula, before any weights are read: parameters, FLOPs and bytes.

FLOPs are two a multiplication of matrices, as torch's FlopCounterMode counts (attention in full, though a
causal one needs half). T tokens,
P prompts, width d, R rows that come down, b bytes a number.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedtune.split.anatomy import Anatomy, look
from fedtune.split.cut import ROLES, Cut, Role
from fedtune.split.row_selection import Kind, pooling

Mode = Literal["naive", "slim", "cached"]
Position = Literal["cut", "input"]


@dataclass(frozen=True)
class Size:
    """Of one part, FLOPs a sample forward: in layers with weights, in attention, and in the embeddings, into
    which no gradient goes."""

    parameters: int
    layers: int
    attention: int
    embeddings: int = 0

    @property
    def forward(self) -> int:
        return self.layers + self.attention + self.embeddings

    @property
    def through(self) -> int:
        """Backward through frozen weights: a matrix once more, attention twice."""
        return self.layers + 2 * self.attention

    @property
    def trained(self) -> int:
        """Backward with gradients of the weights."""
        return 2 * self.layers + 2 * self.attention + self.embeddings


@dataclass(frozen=True)
class Costs:
    """What `fedtune check` prints of a cut.

    share_parameters  the client's head and tail, of the model's parameters (tied ones once)
    share_flops       the client's work a sample, of full fine-tuning's, which has no prompts
    up, down          bytes a step
    once              bytes a sample, once, where the head's answers are kept
    trained           values of prompts and tail (all of it), which travel as an update
    """

    sizes: dict[Role, Size]
    share_parameters: float
    share_flops: float
    up: int
    down: int
    once: int
    trained: int
    kind: Kind

    def break_even(self, batch: int, other: int, own: int) -> float:
        """Samples a round (epochs times samples) at which the cut costs what another method's round costs.

        other, own  bytes of an update there and here, down and up together
        """
        return max(0.0, (other - own) / ((self.up + self.down) / batch + self.once))


def costs(
    net_class: type,
    config: Any,
    cut: Cut,
    *,
    tokens: int,
    batch: int,
    prompts: int,
    position: Position = "cut",
    mode: Mode = "slim",
    number: int = 2,
    labelled: int | None = None,
    into_head: bool = False,
    kind: Kind | None = None,
) -> Costs:
    """`labelled` rows of a sample carry loss in a language model, all where None; `number` is the bytes of
    one value on the wire.

    `into_head` says that the head is trained too, by an adapter, so that gradients go on into it; then slim
    mode does not apply.
    `kind` says which rows the tail reads, where that is not what the class does.

    Raises S701 (cut does not fit).
    """
    anatomy = look(net_class, config)
    cut.check(anatomy.blocks)
    kind = (kind or pooling(net_class, config)) if cut.m == anatomy.blocks else "all"
    net = skeleton(net_class, config)
    longer = tokens + prompts
    plain = {role: size_of(net, anatomy, cut, role, tokens, tokens) for role in ROLES}
    rows = {"first": 1, "last": 1, "each": labelled or tokens, "all": longer}[kind]
    sizes: dict[Role, Size] = {
        "head": size_of(net, anatomy, cut, "head", longer if position == "input" else tokens, tokens),
        "body": size_of(net, anatomy, cut, "body", longer, tokens),
        "tail": size_of(
            net, anatomy, cut, "tail", rows if mode != "naive" and kind == "each" else longer, tokens
        ),
    }
    whole = sum(size.forward + size.trained for size in plain.values())
    head, tail = sizes["head"], sizes["tail"]
    client = (
        head.forward + (head.through if position == "input" or into_head else 0) + tail.forward + tail.trained
    )
    every = sum(value.numel() for value in net.parameters())
    tied = sum(plain[role].parameters for role in ROLES) - every  # the vocabulary, in head and tail both
    own = plain["head"].parameters + plain["tail"].parameters - tied
    up, down = step_bytes(mode, batch, tokens, anatomy.width, number, prompts, batch * rows)
    once = tokens * anatomy.width * number if mode == "cached" else 0
    return Costs(
        sizes,
        own / every,
        client / whole,
        up,
        down,
        once,
        plain["tail"].parameters + prompts * anatomy.width,
        kind,
    )


def step_bytes(
    mode: Mode, batch: int, tokens: int, width: int, number: int, prompts: int, rows: int
) -> tuple[int, int]:
    """Bytes (up, down) of one step; a padding mask, one byte a token, comes on top of them.

    naive   up the hidden state and the gradient behind the body, down the reverse: 2 B (T + P) d each
    slim    up the head's answer B T d, the prompts and the gradients of the rows; down the rows and the
            prompts' gradient
    cached  the same without the head's answer, which the server has kept: (P + R) d each way
    """
    if mode == "naive":
        each = 2 * batch * (tokens + prompts) * width * number
        return each, each
    lean = (prompts + rows) * width * number
    return lean + (batch * tokens * width * number if mode == "slim" else 0), lean


def skeleton(net_class: type, config: Any) -> Any:
    """The network without memory."""
    with torch.device("meta"):
        return net_class(copy.deepcopy(config))


def size_of(net: Any, anatomy: Anatomy, cut: Cut, role: Role, tokens: int, inputs: int) -> Size:
    """One part at work on `tokens` rows a sample; the embeddings always see the `inputs` alone."""
    blocks = [f"{anatomy.layers}.{number}" for number in cut.span(role, anatomy.blocks)]
    beside = {"head": anatomy.front, "body": (), "tail": anatomy.rear}[role]
    values = {id(v): v.numel() for path in (*blocks, *beside) for v in net.get_submodule(path).parameters()}
    layers = sum(matrices(net.get_submodule(path), tokens) for path in blocks)
    rear = tokens if anatomy.place == 0 else 1  # an encoder's task head works on the one row that it reads
    layers += sum(matrices(net.get_submodule(path), rear) for path in beside) if role == "tail" else 0
    front = sum(matrices(net.get_submodule(path), inputs) for path in beside) if role == "head" else 0
    text = net.config.get_text_config()
    attended = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ) * text.num_attention_heads
    return Size(sum(values.values()), layers, len(blocks) * 4 * tokens * tokens * attended, front)


def matrices(module: nn.Module, rows: int) -> int:
    """FLOPs of the layers with weights in a module that sees `rows` rows: two for each weight and row."""
    total = 0
    for part in module.modules():
        name = type(part).__name__
        if isinstance(part, nn.Linear) or name == "Conv1D":
            total += 2 * rows * part.weight.numel()
        elif isinstance(part, nn.Conv2d):
            total += 2 * (rows - 1) * part.weight.numel()  # the class token is no patch
        elif name.endswith("Experts"):  # all experts in one tensor, of which a token uses some
            stacked = [value for value in part.parameters(recurse=False) if value.ndim == 3]
            used = part.config.num_experts_per_tok if hasattr(part, "config") else 0
            total += sum(2 * rows * value.numel() // value.shape[0] * used for value in stacked)
        elif name.endswith("Router"):
            total += 2 * rows * sum(value.numel() for value in part.parameters(recurse=False))
    return total
