"""A network cut in three, as a client works with it: its own side of the cut, and the whole where the body is
in the same process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.methods.sfprompt_settings import SFPromptSettings
from fedtune.model.base import Base
from fedtune.model.split_tunable import PROMPTS, add_lora, attach_split, blank_image, check_context, open_tail
from fedtune.model.tunable import TunableModel, detach, snapshot
from fedtune.rng import seed_of
from fedtune.split.anatomy import block_count
from fedtune.split.body import Frozen
from fedtune.split.body_address import BodyAddress
from fedtune.split.channel import Local
from fedtune.split.codec import Coding
from fedtune.split.cut import Cut, Side
from fedtune.split.el2n import check_sees
from fedtune.split.micro import Micro, Wishes
from fedtune.split.parts import Part
from fedtune.split.prompts import insert, insert_labels, longer
from fedtune.split.row_selection import Kind, pick, pooling, rows_needed, tail_rows, targets
from fedtune.split.selftest import digest
from fedtune.split.service import Service
from fedtune.split.session import Offer


@dataclass(frozen=True)
class Piece:
    """A micro-batch on its way: the head's arguments, labels (prompts counted), what goes beside the hidden
    state (prompts counted), ids of its examples."""

    inputs: dict[str, Any]
    labels: Any
    side: Side
    samples: tuple[int, ...]


class SplitNet:
    """Stands in a tunable model's `net`: called as the model is, it answers with the logits of the model that
    has the prompts at their place.

    kind  which rows the tail reads (fedtune.split.row_selection)
    """

    def __init__(self, part: Part, base: Base, kind: Kind, prompts: Any, s: SFPromptSettings) -> None:
        self.part, self.base, self.prompts, self.s = part, base, prompts, s
        self.kind: Kind = kind if s.slim == "auto" else "all"
        self.count = 0 if prompts is None else len(prompts)
        self.lean = (
            s.position == "cut" and s.slim == "auto" and not s.head_learns
        )  # prompts go up by themselves, what the head says has no gradient

    # --- as a network ---

    def __call__(self, **inputs: Any) -> Any:
        hidden, side = self.entering({name: value for name, value in inputs.items() if name != "use_cache"})
        return SimpleNamespace(logits=self.part.tail(self.part.body(hidden, side), side)[1])

    def train(self, on: bool = True) -> None:
        self.part.train(on)

    def eval(self) -> None:
        self.part.train(False)

    def entering(self, inputs: Mapping[str, Any]) -> tuple[Any, Side]:
        """The body's input (B, T + P, d), with a graph to the prompts."""
        if self.part.place == 0:
            check_context(inputs["input_ids"].shape[1], self.count, self.base.context)
        if self.prompts is None:
            return self.part.head(inputs)
        if self.s.position == "input":
            return self.part.head(inputs, self.prompts)
        hidden, side = self.part.head(inputs)
        return insert(hidden, side, self.prompts, self.part.place)

    # --- on the client's side of the cut ---

    def piece(self, batch: Mapping[str, Any], samples: Sequence[int] = ()) -> Piece:
        inputs = {name: value.to(self.base.device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        if labels.ndim == 2 and self.count:
            labels = insert_labels(labels, self.count, self.part.place)
        side = longer(self.part.entering(inputs, None)[1], self.count, self.part.place)
        return Piece(inputs, labels, side, tuple(samples))

    def micro(self, piece: Piece, kind: Kind) -> Micro:
        """What goes up. The head is not run where the service holds what it says."""
        beside = Side(piece.side.mask, piece.side.positions)
        if not self.lean:
            hidden: Any = self.entering(piece.inputs)[0]
            return Micro(hidden, beside, **self.rows(piece, kind))
        hidden = (
            (lambda: self.part.head(piece.inputs)[0]) if piece.samples else self.part.head(piece.inputs)[0]
        )
        return Micro(
            hidden, beside, self.prompts, self.part.place, samples=piece.samples, **self.rows(piece, kind)
        )

    def rows(self, piece: Piece, kind: Kind) -> dict[str, Any]:
        """Which rows come down: the first of each example, a list, or all."""
        if kind in ("all", "first"):
            return {"row": 0} if kind == "first" else {}
        examples, tokens = piece.inputs["input_ids"].shape
        return {"rows": pick(kind, piece.side, piece.labels, (examples, tokens + self.count))}

    def ended(self, piece: Piece, answer: Any, kind: Kind) -> tuple[Any, Any]:
        """Logits and labels of what came down."""
        value = answer.to(self.base.device)
        if kind != "all":
            return tail_rows(self.part, value, kind)[1], targets(kind, piece.labels)
        return self.part.tail(value, piece.side)[1], piece.labels

    def shortcut(self, piece: Piece) -> tuple[Any, Any]:
        """Logits and labels of head straight into tail (the paper's phase 1)."""
        return self.part.tail(self.entering(piece.inputs)[0], piece.side)[1], piece.labels

    @cached_property
    def image_tokens(self) -> int:
        """Tokens of an image in front of the body, without prompts."""
        return int(self.part.head(blank_image(self.base))[0].shape[1])

    # --- the body ---

    @cached_property
    def own_body(self) -> BodyAddress:
        """The body of this very network, in this process, for all clients that work on it. Raises S711 where
        there is none."""
        if "body" not in self.part.holds:
            raise FedtuneError(
                "S711",
                sentence="this site has only head and tail of the model, and no address of the body service",
                do="start it with fedtune client, or load the whole model",
            )
        cut = self.part.cut
        offer = Offer(self.base.fingerprint, digest(self.part, "body"), cut.k, cut.m, self.part.width)
        service = Service(Frozen(self.part), offer, lambda hello, peer: True, merging=None)
        return BodyAddress(lambda: Local(service), offer, "here", lambda number, client: "")

    def wishes(self) -> Wishes:
        s = self.s
        return Wishes(
            Coding(s.codec),
            s.window,
            lean=True,
            cache=s.cache_smashed,
            prompts=self.count if self.lean else 0,
            masked=not self.part.anatomy.image,
        )


def cut_bench(base: Base, s: SFPromptSettings, seed: int) -> TunableModel:
    """The base with the client's ends opened, prompts made from `seed`, and a SplitNet for a network. Raises
    M306, S701, S703, S704."""
    part, kind = cut_of(base, s)
    before = snapshot(base.net)
    if s.lora_rank:
        blocks = sorted(part.cut.held(("head", "tail"), part.blocks))
        named, settings = add_lora(
            base,
            s.lora_rank,
            [f"{part.anatomy.layers}.{number}" for number in blocks],
            seed_of("adapter", seed),
        )
    else:
        both = {id(value) for role in ("head", "body") for value in part.parameters(role).values()}
        tail = {
            id(value) for value in part.parameters("tail").values()
        } - both  # a tied vocabulary's matrix is the frozen head's too
        named, settings = open_tail(base, [name for name, value in base.weights.items() if id(value) in tail])
    tunable = attach_split(base, named, settings, s.prompts, part.width, seed_of("prompts", seed), before)
    tunable.net = SplitNet(part, base, kind, tunable.named.get(PROMPTS), s)
    return tunable


def cut_of(base: Base, s: SFPromptSettings) -> tuple[Part, Kind]:
    """The base cut, before anything is opened, and which rows its tail reads. Raises S701, S703, S704."""
    if base.attached is not None:
        detach(base.attached)
    config = base.net.config
    blocks = block_count(config)
    cut = Cut(s.head, blocks - s.tail)
    if base.part is not None and base.part.cut != cut:
        raise RuntimeError(f"this base was loaded to be cut at {base.part.cut}, not at {cut}")
    part = base.part or Part(base.net, cut, fresh=base.fresh)
    part.pooling = base.pooling
    kind: Kind = "all" if s.tail else stated_rows(base) if base.device.type == "meta" else rows_needed(part)
    if s.shortcut:
        check_sees(kind, cut, blocks)
    return part, kind


def stated_rows(base: Base) -> Kind:
    """Which rows the task head reads, before there are weights to try."""
    pooled: dict[str, Kind] = {"mean": "all", "cls": "first", "last": "last"}
    return pooled.get(base.pooling) or pooling(type(base.net), base.net.config)
