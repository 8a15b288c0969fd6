"""A cohort of one client whose rows are all here: whom a training alone asks before it begins, so that it
starts as the federation does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fedtune.methods.interface import Verb
from fedtune.types import Client, Round, State, Sums, Tensors, Update


class OneClient:
    """Its answers as they are: no chain, nothing that travels."""

    def __init__(self, verbs: Mapping[str, Verb], client: Client, seed: int) -> None:
        self.verbs, self.client, self.now = verbs, client, Round(1, seed, (client.id,))

    def sum(self, verb: str, given: Tensors) -> Update:
        return self.verbs[verb].work(self.client, given, self.now)


class Begins(Protocol):
    """A method that asks something once, before its first round."""

    @property
    def verbs(self) -> Mapping[str, Verb]: ...

    def begin(self, state: State, cohort: Sums) -> State: ...

    def install(self, state: State, tunable: Any) -> None: ...


def begin_alone(method: Begins, tunable: Any, data: Any, state: State, seed: int, body: Any = None) -> None:
    """The state of a federation of this one client before its first round, in the tunable model; `body` where
    the network is not in one piece."""
    method.install(state, tunable)
    client = Client(0, "alone", tunable, data, body=body)
    method.install(method.begin(state, OneClient(method.verbs, client, seed)), tunable)
