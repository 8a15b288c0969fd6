"""How far single answers move the state, where they are seen: long moves are shortened to a multiple of the
running median, and each member's part in the mean is said.

A move is an answer's difference from what was given, as it counts: factors of an adapter, not their products.
What a mask hides has no move that anybody could look at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from fedtune.events import Alarm, Contributed, Event, Shortened
from fedtune.experts.sketch import sketch
from fedtune.rng import seed_of
from fedtune.runtime.bounds import norm_of
from fedtune.runtime.overlaps import OVERLAPS, most_moved, pairs
from fedtune.types import Tensors, Update

if TYPE_CHECKING:
    from fedtune.runtime.run import Run

LOOKED_BACK = 5  # rounds whose medians are the running one: moves grow shorter as training goes on
SIZE = 2048  # numbers of a sketch: cosines are right to about 0.02
AGAINST = -0.5  # the cosine to the others' mean below which a member's answer raises an alarm
PARTS = "influence:"  # how the journal names what each member contributed to a round
NOTED = "move/"  # a round's figure: the median move of a verb's answers


def limit_of(clip: float, medians: Sequence[float]) -> float:
    """The longest move that counts whole; infinity where nothing is known."""
    known = [value for value in medians[-LOOKED_BACK:] if value > 0]
    return clip * statistics.median(known) if known else math.inf


def shortened(
    answers: Iterable[tuple[int, Update]],
    near: Callable[[int], Tensors | None],
    clip: float,
    medians: Sequence[float],
    cut: Callable[[int, float, float], None],
    note: Callable[[float], None],
) -> Iterator[tuple[int, Update]]:
    """Answers with no move longer than `clip` times the running median (Sun et al. 2019, arXiv:1911.07963,
    with a bound that follows the run). Answers of the first round are held until its median is known.

    near     client -> what its answer is near to; None where the answer is a difference already
    medians  of the rounds before, in order
    cut      told of a client, its norm and the limit, where a move is shortened
    note     told the round's median
    """
    norms: list[float] = []
    held = None if medians else list(answers)
    if held is not None:
        lengths = [length(update, near(client)) for client, update in held]
        medians = [statistics.median(lengths)] if lengths else []
    limit = limit_of(clip, medians)
    for client, update in answers if held is None else held:
        origin = near(client)
        norm = length(update, origin)
        norms.append(norm)
        if norm > limit:
            cut(client, norm, limit)
            update = scaled(update, origin, limit / norm)
        yield client, update
    if norms:
        note(statistics.median(norms))


def length(update: Update, origin: Tensors | None) -> float:
    """L2 of a move; 0 for whole numbers, whose bounds are in their schema."""
    return norm_of(moved(update, origin)) or 0.0


def moved(update: Update, origin: Tensors | None) -> Update:
    return update if origin is None else update.shifted(origin, -1)


def scaled(update: Update, origin: Tensors | None, share: float) -> Update:
    """The answer whose move is so much of this one's."""
    tensors = {name: value * share for name, value in moved(update, origin).tensors.items()}
    short = replace(update, tensors=tensors)
    return short if origin is None else short.shifted(origin, +1)


@dataclass
class Parts:
    """What each member of a round contributed. Kept as sketches: memory does not grow with the model."""

    seed: int
    weights: dict[int, float] = field(default_factory=dict)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    most: dict[int, np.ndarray] = field(default_factory=dict)  # places of the most moved weights

    def add(self, client: int, update: Update, origin: Tensors | None) -> None:
        move = moved(update, origin)
        norm = norm_of(move)
        if norm is not None:
            self.most[client] = most_moved(move.tensors)
            drawn = sketch(move.values(), SIZE, seed_of("parts", self.seed))
            self.weights[client], self.vectors[client] = update.weight, norm * drawn.astype(np.float64)

    def told(self) -> Mapping[int, dict[str, float]]:
        """Client -> norm of its move; cosine to the weighted mean of the others; alone: how far the mean
        moves without it, as a share of the mean's norm. {} for fewer than two."""
        if len(self.vectors) < 2:
            return {}
        whole = sum(self.weights.values())
        total = sum((self.weights[c] * v for c, v in self.vectors.items()), np.zeros(SIZE))
        found = {}
        for client, vector in self.vectors.items():
            others = (total - self.weights[client] * vector) / (whole - self.weights[client])
            norm, rest, mean = (float(np.linalg.norm(one)) for one in (vector, others, total / whole))
            found[client] = {
                "norm": norm,
                "cosine": float(vector @ others) / (norm * rest) if norm * rest else 0.0,
                "alone": float(np.linalg.norm(total / whole - others)) / mean if mean else 0.0,
            }
        return found


@dataclass
class Moves:
    """Of one round: bounded as [limits] says, looked at as [watch] says.

    clip      as limits.clip; 0 shortens nothing
    earlier   figures of the rounds before
    parts     verb -> what each member contributed; None where nobody wants to know
    """

    number: int
    names: Mapping[int, str]
    tell: Callable[[Event], None]
    clip: float
    earlier: Sequence[Mapping[str, float]]
    parts: dict[str, Parts] | None = None

    def of(
        self,
        verb: str,
        answers: Iterable[tuple[int, Update]],
        near: Callable[[int], Tensors | None],
        note: Callable[[str, float], None],
    ) -> Iterator[tuple[int, Update]]:
        """The answers to a verb, as they count."""
        name = NOTED + verb
        if self.clip:
            medians = [figures[name] for figures in self.earlier if name in figures]
            answers = shortened(answers, near, self.clip, medians, self._cut, lambda value: note(name, value))
        for client, update in answers:
            if self.parts is not None:
                self.parts.setdefault(verb, Parts(self.number)).add(client, update, near(client))
            yield client, update

    def _cut(self, client: int, norm: float, limit: float) -> None:
        self.tell(Shortened(self.number, client, self.names[client], norm, limit))

    def told(self) -> dict[str, dict[str, dict[str, float]]]:
        """Verb -> member -> its part. Tells, and raises an alarm for who points away from the others."""
        found = {
            verb: {self.names[client]: part for client, part in parts.told().items()}
            for verb, parts in (self.parts or {}).items()
        }
        for verb, members in found.items():
            self.tell(Contributed(self.number, verb, members))
            for name, part in members.items():
                if len(members) > 2 and part["cosine"] < AGAINST:
                    text = f"'{name}' moves the state against the others: cosine {part['cosine']:.2f}, norm "
                    self.tell(Alarm(self.number, "influence", f"{text}{part['norm']:.3g}"))
        return found


def moves_of(work: Run, number: int) -> Moves:
    """Of a round that begins now."""
    recipe = work.recipe
    earlier = [row.metrics for row in work.journal.rounds()] if recipe.limits.clip else []
    parts: dict[str, Parts] | None = {} if recipe.watch.influence else None
    return Moves(number, work.workspace.names, work.tell, recipe.limits.clip, earlier, parts)


def keep_parts(work: Run, moves: Moves) -> None:
    """What each member contributed, where somebody wants to know, in the journal."""
    if told := moves.told():
        work.journal.finish(f"{PARTS}{moves.number}", told)
    for parts in (moves.parts or {}).values():
        alike = pairs({moves.names[client]: places for client, places in sorted(parts.most.items())})
        work.journal.finish(f"{OVERLAPS}{moves.number}", alike)
