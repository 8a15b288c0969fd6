"""The words that every room speaks: updates, rounds, clients, states, cohorts.

An `Update` is what a client answers. It can be added, so that a server may see sums only:

    >>> a = Update.of({"w": np.float32([1, 2])}, weight=1)
    >>> b = Update.of({"w": np.float32([4, 5])}, weight=2)
    >>> (a + b).mean().tensors["w"].tolist()
    [3.0, 4.0]
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from fedtune.errors import FedtuneError

TOKEN_TASKS = ("causal-lm", "instruct")  # values of data.task: language models with a loss for each token
LM_TASKS = (*TOKEN_TASKS, "preference")  # all language models; a pair of responses has one loss
Tensors = Mapping[str, np.ndarray]
Group = TypeVar("Group", bound=Hashable)
Brought = TypeVar("Brought")


@dataclass(frozen=True)
class Update:
    """A client's answer, or a sum of answers.

    tensors  name -> array, already times `weight`; float64 unless a transform changed them, so that a sum of
             up to 2**20 weighted float32 values divides back to the float32 it came from
    weight   how much this answer counts, as method.weight says
    metrics  name -> number, already times `weight`
    scales   name -> array, filled only by transforms that turn tensors into integer levels
    notes    what the client's transforms chose, and why, for the run's events; no part of the message, and of
             no sum
    """

    tensors: Tensors
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    scales: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Tensors, weight: float = 1.0, metrics: Mapping[str, float] | None = None) -> Update:
        """An update that says `values`, with the given weight."""
        return cls(
            {name: np.multiply(value, weight, dtype=np.float64) for name, value in values.items()},
            float(weight),
            {name: float(number) * weight for name, number in (metrics or {}).items()},
        )

    def __add__(self, other: Update) -> Update:
        """The sum of two answers, in arrays of its own; names must agree."""
        return self.joined(other, lambda one, two: np.asarray(one + two))

    def joined(self, other: Update, add: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Update:
        """The sum of two answers, tensor by tensor as `add` does it."""
        if self.tensors.keys() != other.tensors.keys():
            raise ValueError(
                "updates of different names cannot be added: "
                f"{sorted(self.tensors.keys() ^ other.tensors.keys())[:3]}"
            )
        return Update(
            {name: add(value, other.tensors[name]) for name, value in self.tensors.items()},
            self.weight + other.weight,
            {
                name: self.metrics.get(name, 0.0) + other.metrics.get(name, 0.0)
                for name in self.metrics.keys() | other.metrics.keys()
            },
        )

    def mean(self) -> Update:
        """What the answers say on average: tensors and metrics divided by the weight, which becomes 1."""
        tensors = {name: value / self.weight for name, value in self.tensors.items()}
        return Update(tensors, 1.0, {name: number / self.weight for name, number in self.metrics.items()})

    def values(self) -> dict[str, np.ndarray]:
        """The mean as float32, which is how values are stored and sent."""
        return {
            name: np.asarray(value / self.weight, dtype=np.float32) for name, value in self.tensors.items()
        }

    def shifted(self, origin: Tensors, sign: int) -> Update:
        """Values moved by `sign` times `origin`: -1 turns states into differences, +1 turns them back."""
        step = sign * self.weight
        return replace(
            self,
            tensors={
                name: value + np.multiply(origin[name], step, dtype=np.float64)
                for name, value in self.tensors.items()
            },
        )


class RunningSum:
    """a + b + c in the order in which they come and to the bit, in one set of arrays however many come; the
    updates stay as they are."""

    def __init__(self) -> None:
        self.total: Update | None = None  # None: nothing has come
        self.count = 0

    def add(self, update: Update) -> None:
        if self.total is None:
            self.total = update
        else:  # the third is the first that finds a total whose arrays are our own
            self.total = self.total.joined(update, onto) if self.count > 1 else self.total + update
        self.count += 1


def summed(updates: Iterable[Update]) -> Update | None:
    """The running sum of all; None for none."""
    running = RunningSum()
    for update in updates:
        running.add(update)
    return running.total


def onto(total: np.ndarray, value: np.ndarray) -> np.ndarray:
    """total + value, in total's memory where type and shape of the sum are its own."""
    if (
        np.result_type(total, value) == total.dtype
        and np.broadcast_shapes(total.shape, value.shape) == total.shape
    ):
        np.add(total, value, out=total)
        return total
    return np.asarray(total + value)


@dataclass(frozen=True)
class Round:
    """All that a half of a conversation may know about now."""

    number: int  # 1 is the first
    seed: int  # the run's seed
    members: tuple[int, ...]  # ids of the clients asked, ascending


@dataclass
class Client:
    """A site's world. `state` is the only thing that outlives a round; it holds numpy arrays and stays at
    the site."""

    id: int
    name: str
    model: Any  # fedtune.model.tunable.TunableModel: the shared base with this method's trainable tensors
    data: Any  # fedtune.model.encode.Encoded: the site's training examples
    state: dict[str, np.ndarray] = field(default_factory=dict)
    body: Any = None  # the split service, where the method needs one
    held_out: Callable[[], Any] | None = None  # its rows for scoring, encoded when they are wanted
    vault: Any = None  # fedtune.privacy.vault.Vault: secrets of a round's masked sums, never in its state


@dataclass(frozen=True)
class State:
    """What the server carries from round to round: what clients are given, and what it keeps to itself."""

    shared: Tensors
    kept: Tensors = field(default_factory=dict)


class Sums(Protocol):
    """Clients whose answers are seen as a sum only."""

    def sum(self, verb: str, given: Tensors) -> Update:
        """Ask every member; the caller sees the sum only."""


class Cohort(Sums, Protocol):
    """This round's clients. Members that fail are left out, counted and named by the runtime."""

    def sum(self, verb: str, given: Tensors | Callable[[int], Tensors]) -> Update:
        """Ask every member; the caller sees the sum only. Members may be given different tensors, by client
        id, as long as those that they move are the same."""

    def each(
        self, verb: str, given: Tensors | Callable[[int], Tensors], among: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Update]]:
        """Ask every member and read single answers, in ascending id; the verb must say so (`reads_each`).

        Members may be given different tensors: then `given` says what, by client id. `among` asks these
        members alone.
        """

    def sum_groups(
        self,
        verb: str,
        given: Tensors | Callable[[Group], Tensors],
        group_of: Callable[[int], Group | None],
        min_group: int = 2,
    ) -> dict[Group, Update]:
        """Ask every member of a group once, and nobody else (group None); the caller sees one sum for each
        group of members, and no sum of fewer than `min_group` answers.

        Groups may be given different tensors: then `given` says what, by group. A sum of one is a single
        answer: for `min_group` = 1 the verb must say `reads_each`, otherwise `by_group`, because the exposure
        table tells users. Groups from which too few answers came are left out.
        """

    def typical(self, name: str) -> float:
        """A figure as the median client of this round says it: no single one decides what a run does because
        of it."""

    def note(self, name: str, value: float) -> None:
        """A figure of the server's own for this round's journal and events."""

    def skip(self, error: FedtuneError) -> None:
        """This round changes nothing, and `error` says why: no answer counts, as if all had been lost on the
        way."""


def if_answered(ask: Callable[[], Brought]) -> Brought | None:
    """What a question brings that a round can do without; None where no client gave a usable answer."""
    try:
        return ask()
    except FedtuneError as error:
        if error.code != "R405":
            raise
        return None
