"""What one client does in a round: training without the body, choosing examples, training through the
body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.methods.sfprompt_frames import pieces_of
from fedtune.methods.sfprompt_net import Piece, SplitNet
from fedtune.methods.sfprompt_settings import SFPromptSettings
from fedtune.model.encode import Encoded
from fedtune.model.features import class_sums
from fedtune.model.fit import Backward, fit
from fedtune.model.forward import forward_only
from fedtune.model.loss import autocast, carries
from fedtune.model.split_tunable import PROMPTS, longest, padded, subset, sum_of_losses
from fedtune.model.tunable import TunableModel
from fedtune.rng import seed_of, stream
from fedtune.split import el2n, pipeline
from fedtune.split.body_address import BodyAddress
from fedtune.split.micro import Micro
from fedtune.split.row_selection import Kind
from fedtune.split.stream import Stream

# Examples of a client on which the shortcut is compared with the truth, at least and at most; they go through
# the cut too, and count in its bytes,
# so they are an eighth of a client's where that lies between.
PROBE = (8, 32)
HELD = "cut/held"  # in a client's state
NOTHING, NONE = np.zeros(0, np.int64), np.zeros(0)


@dataclass
class Share:
    """One client's share of a round, while its session with the body service is open."""

    tunable: TunableModel
    data: Encoded
    s: SFPromptSettings
    stream: Stream
    seed: int
    progress: tuple[int, int]

    @property
    def net(self) -> SplitNet:
        net: SplitNet = self.tunable.net
        return net

    def work(self) -> dict[str, float]:
        """All phases; the figures, without the bytes."""
        figures: dict[str, float] = {}
        s, kept = self.s, list(range(len(self.data)))
        if s.local_update:
            figures["body_loss_before"] = self.probed()[0]
            alone = s.train.model_copy(update={"steps": 0, "epochs": s.local_update})
            fit(
                self.tunable,
                self.data,
                alone,
                seed_of("local update", self.seed),
                self.progress,
                self.by_shortcut,
                self.rates,
            )
        after, true = self.probed() if s.shortcut else (0.0, NONE)
        if s.local_update:
            figures["body_loss_after"] = after
        if s.pruning == "random":
            kept = el2n.random(len(self.data), s.keep, self.seed)
        if s.pruning == "el2n":
            guessed = self.guessed()
            kept = el2n.hardest(guessed, s.keep)
            figures["el2n_rank"] = el2n.spearman(guessed[self.probe], true)
        data, step = subset(self.data, kept), self.through_body(kept)
        figures["loss"] = fit(
            self.tunable, data, s.train, seed_of("split training", self.seed), self.progress, step, self.rates
        ).loss
        return figures

    @property
    def rates(self) -> Mapping[str, float]:
        """Of tensors that have one of their own."""
        rates = {PROMPTS: self.s.prompt_lr} if self.s.prompts else {}
        if self.s.matrix_lr == "auto":
            return rates
        others = self.tunable.named.keys() - self.tunable.of_head - {PROMPTS}
        matrices = sorted(name for name in others if self.tunable.named[name].ndim > 1)
        return rates | dict.fromkeys(matrices, self.s.matrix_lr)

    # --- without the body ---

    def by_shortcut(
        self, micro: Sequence[Sequence[int]], batches: Sequence[dict[str, Any]], terms: int
    ) -> float:
        """A step of phase 1: its loss, gradients in `.grad`."""
        loss = 0.0
        for batch in batches:
            with autocast(self.tunable, self.s.train.autocast):
                part = sum_of_losses(*aligned(*self.net.shortcut(self.net.piece(batch)))) / terms
            part.backward()
            loss += part.item()
        return loss

    def guessed(self) -> np.ndarray:
        """EL2N of all examples by the shortcut: (examples,)."""
        with forward_only(self.tunable, self.data), autocast(self.tunable, "off"):
            pieces = map(self.net.piece, self.batches(range(len(self.data))))
            return np.concatenate([el2n.el2n(*self.net.shortcut(piece)).cpu().numpy() for piece in pieces])

    # --- through the body ---

    def through_body(self, kept: Sequence[int]) -> Backward:
        """A step of split training on examples that are numbered as in `kept`; micro-batches in flight, sums
        in their order."""
        net, held = self.net, self.s.cache_smashed
        length = longest(self.data) if held else 0  # what is held has the length at which it was sent

        def step(micro: Sequence[Sequence[int]], batches: Sequence[dict[str, Any]], terms: int) -> float:
            def up(piece: Piece) -> Micro:
                with autocast(self.tunable, self.s.train.autocast):
                    return net.micro(piece, net.kind)

            def down(piece: Piece, answer: Any) -> Any:
                with autocast(self.tunable, self.s.train.autocast):
                    return sum_of_losses(*aligned(*net.ended(piece, answer, net.kind))) / terms

            examples = [[kept[n] for n in numbers] for numbers in micro]
            pieces = (
                piece
                for ids, batch in zip(examples, batches, strict=True)
                for piece in self.pieces(*((padded(batch, length), ids) if held else (batch,)))
            )
            return sum(pipeline.train(self.stream, pieces, up, down))

        return step

    @property
    def probe(self) -> list[int]:
        """A few of the client's examples, the same before and after phase 1."""
        size = min(max(len(self.data) // 8, PROBE[0]), PROBE[1])
        return sorted(stream("split probe", self.seed).permutation(len(self.data))[:size].tolist())

    def probed(self) -> tuple[float, np.ndarray]:
        """Mean loss of the probe through the body, and its examples' EL2N."""
        net, batches, total, found = self.net, self.batches(self.probe), 0.0, list[np.ndarray]()
        kind: Kind = "all" if net.kind == "each" else net.kind  # a text's score is a mean over its own tokens
        pieces = partial(self.pieces, kind=kind)

        def up(piece: Piece) -> Micro:
            with autocast(self.tunable, "off"):
                return net.micro(piece, kind)

        def down(piece: Piece, answer: Any) -> None:
            nonlocal total
            with autocast(self.tunable, "off"):
                logits, labels = net.ended(piece, answer, kind)
            total += float(sum_of_losses(*aligned(logits, labels)))
            found.append(el2n.el2n(logits, labels).cpu().numpy())

        net.eval()
        pipeline.infer(self.stream, chain.from_iterable(map(pieces, batches)), up, down)
        return total / sum(carries(self.tunable.base.task, batch) for batch in batches), np.concatenate(found)

    def features(self, moments: bool) -> dict[str, np.ndarray]:
        """What the task head reads of all examples, summed by class (model/features.py)."""
        net = self.net

        def run(batches: Iterable[dict[str, Any]], each: Callable[[Any], None]) -> None:
            def down(piece: Piece, answer: Any) -> None:
                net.ended(piece, answer, net.kind)
                each(piece.labels)

            net.eval()
            pieces = chain.from_iterable(map(self.pieces, batches))
            pipeline.infer(self.stream, pieces, lambda piece: net.micro(piece, net.kind), down)

        return class_sums(self.tunable, self.data, moments, run)

    def pieces(
        self, batch: Mapping[str, Any], samples: Sequence[int] = (), kind: Kind | None = None
    ) -> Iterator[Piece]:
        return pieces_of(self.net, self.stream, kind or self.net.kind, batch, samples)

    def batches(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        size = self.s.train.batch
        return [self.data.collate(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def aligned(logits: Any, labels: Any) -> tuple[Any, Any]:
    """A language model's logits predict the next label."""
    return (logits[:, :-1], labels[:, 1:]) if labels.ndim == 2 else (logits, labels)


def one_turn(
    tunable: TunableModel,
    data: Encoded,
    s: SFPromptSettings,
    body: BodyAddress,
    turn: tuple[int, int],
    seed: int,
    progress: tuple[int, int],
    client_state: dict[str, np.ndarray],
) -> dict[str, float]:
    """All that a client does when asked in round `turn[0]` as number `turn[1]`; what it trained is in the
    tunable model, its figures come back.

    `client_state` keeps which examples the service may still hold. Raises ClientFailed for whatever goes
    wrong at the cut.
    """
    with opened(tunable, body, turn) as session:
        session.held.update(client_state.get(HELD, NOTHING).tolist())
        figures = Share(tunable, data, s, session, seed, progress).work()
        if s.cache_smashed:
            client_state[HELD] = np.asarray(sorted(session.held), np.int64)
    return {**figures, "cut_up_bytes": float(session.sent), "cut_down_bytes": float(session.received)}


def features(
    tunable: TunableModel,
    data: Encoded,
    s: SFPromptSettings,
    body: BodyAddress,
    turn: tuple[int, int],
    moments: bool,
) -> dict[str, np.ndarray]:
    """The client's half of a head start, through the body. Raises ClientFailed as `one_turn` does."""
    with opened(tunable, body, turn) as session:
        return Share(tunable, data, s, session, 0, (0, 1)).features(moments)


@contextmanager
def opened(tunable: TunableModel, body: BodyAddress, turn: tuple[int, int]) -> Iterator[Stream]:
    """A session with the body; what goes wrong at the cut is this client's failure."""
    try:
        session = body.open(*turn, tunable.net.wishes())
        try:
            yield session
        finally:
            session.close()
    except ClientFailed:
        raise
    except FedtuneError as error:
        raise ClientFailed(error.code, error.found, error.expected, error.do) from error
