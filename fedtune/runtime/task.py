"""A verb as both ends of a conversation know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fedtune.methods import Method, Together, Verb, Work
from fedtune.schema import Schema
from fedtune.transforms.base import Chain, Question
from fedtune.types import Round, Tensors


@dataclass(frozen=True)
class Task:
    """A verb as both ends know it.

    work    the client's half
    given   tunable model, client, round -> the schema of what that client is given
    otherwise  other schemas of what it may be given; as of a verb
    answer  schema given, round -> the schema of the answer
    chain   the steps that an answer goes through
    moves   the answer is the given tensors, moved: under a chain the difference travels, and the downlink may
            be lossy
    holds   clients keep the whole numbers that they are given, so that later only changes need travel
    directed  only the direction of the answer counts
    row_noise  standard deviation of the noise of its client's on every number of the sum over its rows
    trains  the client's half needs training rows
    reads_each  the server reads single answers
    by_group    the server reads sums of groups
    figures     names of the figures that an answer may carry
    together    how many clients at most can be asked at once, and how
    """

    work: Work
    given: Callable[[Any, int, Round], Schema]
    answer: Callable[[Schema, Round], Schema]
    chain: Chain = field(default_factory=Chain)
    moves: bool = False
    holds: bool = False
    directed: bool = False
    row_noise: float = 0.0
    trains: bool = True
    reads_each: bool = False
    by_group: bool = False
    figures: tuple[str, ...] = ()
    together: tuple[int, Together | None] = (1, None)
    otherwise: Callable[[Any, int, Round], Iterable[Schema]] | None = None

    def kinds(self, answer: Schema) -> frozenset[str]:
        """What numbers an answer may hold: as the method declares whole numbers, as the chain leaves them
        otherwise."""
        return frozenset({"whole"}) if answer.whole and not self.chain.steps else self.chain.kinds

    def sent(self, given: Schema, now: Round) -> Schema:
        """The schema of the answer as it travels, behind the chain."""
        return self.chain.sent(self.answer(given, now))

    def near(self, given: Tensors) -> Tensors | None:
        """What an answer is the difference to, under a chain."""
        return given if self.moves else None


def chain_for(verb: Verb, chain: Chain) -> Chain:
    """What the answers to a question go through. Where single answers are read, steps that only a sum can
    undo are left out; where it is asked once in a run, codes are: they are for updates, whose errors later
    rounds make up for, and sums of a bit a number start no head."""
    return Chain(
        [
            step
            for step in chain.steps
            if not (verb.reads_each and step.undone == "sum")
            and not (verb.once and step.tolerance is not None)
        ]
    )


def question_of(name: str, verb: Verb, method: Method, run: str = "") -> Question:
    """What the steps of a chain may know of a verb."""
    return Question(run, name, verb.moves, verb.whole, verb.directed, method.facts.metrics)


def tasks_of(method: Method, chain: Chain, run: str) -> dict[str, Task]:
    """A task for each verb of a method."""

    def task(name: str, verb: Verb) -> Task:
        about = question_of(name, verb, method, run)
        return Task(
            verb.work,
            verb.given,
            verb.answer,
            chain_for(verb, chain).bound(about),
            verb.moves,
            verb.holds,
            verb.directed,
            verb.spends.noise if verb.spends else 0.0,
            reads_each=verb.reads_each,
            by_group=verb.by_group,
            figures=about.figures,
            together=verb.together,
            otherwise=verb.otherwise,
        )

    return {name: task(name, verb) for name, verb in method.verbs.items()}
