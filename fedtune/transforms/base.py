"""What happens to an update between a client's hand and the server's sum.

A transform has a client half and a server half, side by side. The server half runs either on each reply or on
the sum, never on both, and `undone` says which. One rule makes a chain legal: every step undone on the sum
stands
before every step undone on a reply, and each step takes what the one before it gives.

`ring > mask` is legal; `ternary > mask` is not: a mask adds ring numbers, and packed levels of different
clients cannot be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal

from fedtune.errors import FedtuneError
from fedtune.privacy.releases import Release
from fedtune.schema import Schema
from fedtune.settings import Settings
from fedtune.types import Client, Round, Tensors, Update

Kind = Literal["real", "ring", "packed", "any", "same"]


@dataclass(frozen=True)
class Question:
    """What a step may know of the question whose answers it works on.

    run, verb  whose it is, and what is asked
    moves      the answers are differences to what was given
    whole      they are whole numbers
    directed   only their direction counts
    figures    names of the figures that they may carry
    attempt    1, or more where it is asked again in one round, from the keys on
    """

    run: str = ""
    verb: str = ""
    moves: bool = True
    whole: bool = False
    directed: bool = False
    figures: tuple[str, ...] = ()
    attempt: int = 1


class Transform:
    """One step of a chain; a subclass overrides the halves that it has."""

    name: str = "transform"
    undone: ClassVar[Literal["reply", "sum"]] = "reply"
    takes: ClassVar[Kind] = "real"
    gives: ClassVar[Kind] = "real"
    hides: ClassVar[bool] = False  # after it, a single client's answer can no longer be read
    wide: bool = False  # ring numbers are of 64 bits
    drops_figures: ClassVar[bool] = False  # answers carry no loss and no weight of their own
    relative: bool = True  # it works on the difference to what was given
    words: str = ""  # what it does to an answer, for who decides on it

    tolerance: float | None = (
        # of a code: how far the decoded mean may be from the mean sent, as a share of its L2 norm; None: no
        # code
        None
    )

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        return update

    def on_reply(self, update: Update, client: int, now: Round) -> Update:
        return update

    def on_sum(self, total: Update, now: Round) -> Update:
        return total

    def bound(self, question: Question) -> Transform:
        """The step for the answers to one question."""
        return self

    def sent(self, answer: Schema) -> Schema:
        """What an answer of this schema is after the step."""
        return answer

    def bits(self, schema: Schema, before: float) -> float:
        """Estimated bits a parameter on the wire after this step, given those before it."""
        return before


class StepSettings(Settings):
    """[[chain]]: a step's settings, beside the step that they build. The union of these classes is the
    registry (registry.py)."""

    step: str

    @property
    def spends(self) -> Release | None:
        """What one answer gives away of its client, where the step bounds it."""
        return None

    def build(self) -> Transform:
        raise NotImplementedError(f"{type(self).__name__} builds no step")


class Chain:
    """Transforms in order. Where a verb moves what it was given (`near`), the steps work on the difference.

    Without steps nothing is subtracted: the value itself travels, so that one client equals ordinary training
    to
    the bit (old + (new - old) is not always new in float32).
    """

    def __init__(self, steps: Sequence[Transform] = ()) -> None:
        held = check_order(steps)
        self.steps = tuple(steps)
        ring = "ring64" if any(step.wide for step in steps) else "ring"
        self.relative = any(step.relative for step in steps)
        self.kinds = frozenset(
            {{"real": "values", "ring": ring, "packed": "levels"}[held]}
        )  # what a receiver may expect
        self.adds = held == "ring"  # answers are read as a sum only, with their weights and figures in it
        self.hides = next((step.name for step in steps if step.hides), "")  # the step, where there is one

    def bound(self, question: Question) -> Chain:
        """The chain for the answers to one question."""
        return Chain([step.bound(question) for step in self.steps])

    def sent(self, answer: Schema) -> Schema:
        """What an answer of this schema is when it leaves the client."""
        return reduce(lambda schema, step: step.sent(schema), self.steps, answer)

    def send(self, update: Update, client: Client, now: Round, near: Tensors | None = None) -> Update:
        """The client's halves, in order. A step holds nothing of one answer: clients may go through one chain
        at the same time."""
        if self.relative and near is not None:
            update = update.shifted(near, -1)
        return reduce(lambda u, step: step.on_client(u, client, now), self.steps, update)

    def receive(self, update: Update, client: int, now: Round) -> Update:
        """The server's halves for one reply, in reverse, down to one that only the sum undoes."""
        for step in reversed(self.steps):
            update = step.on_reply(update, client, now)
            if step.undone == "sum":
                break
        return update

    def settle(self, total: Update, now: Round, near: Tensors | None = None) -> Update:
        """The server's halves for the sum, in reverse."""
        total = reduce(lambda u, step: step.on_sum(u, now), reversed(self.steps), total)
        return total.shifted(near, +1) if self.relative and near is not None else total


def check_order(steps: Sequence[Transform]) -> Kind:
    """Refuse a chain that could not be undone, with the reason; the kind of numbers that leaves it. Raises
    C104."""
    held: Kind = "real"
    late = ""
    for step in steps:
        if step.takes not in ("any", held):
            raise FedtuneError(
                "C104",
                f"'{step.name}' after a step that gives {held} numbers",
                f"{step.takes} numbers before '{step.name}'",
                "reorder or remove steps of [[chain]]",
            )
        if step.undone == "sum" and late:
            raise FedtuneError(
                "C104",
                f"'{step.name}', which is undone on the sum, after '{late}', which is undone on each reply",
                "steps undone on the sum first",
                f"move '{step.name}' before '{late}' in [[chain]]",
            )
        late = step.name if step.undone == "reply" else late
        held = held if step.gives == "same" else step.gives
    return held
