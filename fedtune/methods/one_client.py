"""A cohort of one client whose rows are all here: whom a training alone asks before it begins, so that it
starts as the federation does."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.methods.interface import Verb
from fedtune.types import Client, Round, Tensors, Update


class OneClient:
    """Its answers as they are: no chain, nothing that travels."""

    def __init__(self, verbs: Mapping[str, Verb], client: Client, seed: int) -> None:
        self.verbs, self.client, self.now = verbs, client, Round(1, seed, (client.id,))

    def sum(self, verb: str, given: Tensors) -> Update:
        return self.verbs[verb].work(self.client, given, self.now)
