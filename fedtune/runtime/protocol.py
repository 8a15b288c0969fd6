"""What both ends of a conversation agree on: questions, replies, and how each verb is asked, answered and
coded.

Both halves speak the wire format even inside one process, so that what is measured, refused and computed is
the same
whether a client is a function call away or a continent. How a question reaches a client is the transport's
business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.methods import Method
from fedtune.runtime.bounds import LARGEST, Bounds, too_large
from fedtune.runtime.masked_tasks import with_masks
from fedtune.runtime.task import Task, tasks_of
from fedtune.schema import Schema
from fedtune.transforms.base import Chain
from fedtune.transforms.downlink import DownlinkCode, Plain
from fedtune.types import Round, Tensors, Update
from fedtune.wire import EVERYONE, Expect, Header
from fedtune.wire.settings import LimitSettings


@dataclass(frozen=True)
class Ask:
    """A question to one member: a verb and an encoded state."""

    client: int
    verb: str
    now: Round
    payload: bytes
    last: int = 0  # the last round in which an answer of this client counted; 0: none yet
    first: bool = True  # the first question of its round


@dataclass(frozen=True)
class Reply:
    """A member's answer as it came over the wire, or why there is none."""

    client: int
    payload: bytes = b""
    failure: FedtuneError | None = None
    said: str = ""  # what the client's chain chose, and why
    seconds: float = 0.0  # of the client's work, where a transport knows them apart from its own


Transport = Callable[[Sequence[Ask]], Iterable[Reply]]  # every ask gets exactly one reply, in any order
Given = Tensors | Callable[[int], Tensors]  # the same for all members, or by client


def given_to(client: int, given: Given) -> Tensors:
    return given(client) if callable(given) else given


@dataclass(frozen=True)
class Link:
    """What both ends of a conversation agree on before the first message."""

    run: str  # the run's identity
    base: str  # fingerprint of the base model
    method: Method
    chain: Chain
    downlink: DownlinkCode = field(default_factory=Plain)
    limits: LimitSettings = field(default_factory=LimitSettings)
    more: Mapping[str, Task] = field(default_factory=dict)  # the run's own tasks, beside the method's verbs
    bounds: Bounds = field(
        default_factory=Bounds
    )  # what the server takes for an answer, beside the limits of the recipe

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        """Everything that can be asked, by verb."""
        own = tasks_of(self.method, self.chain, self.run)
        if twice := sorted(own.keys() & self.more.keys()):
            raise RuntimeError(f"{self.method.facts.type} has a verb '{twice[0]}', which is the run's own")
        return with_masks({**own, **self.more}, self.run)

    def coded(self, verb: str) -> bool:
        """Whether what is given with a verb travels through the downlink's code: only what the verb moves can
        be lossy."""
        return self.downlink.lossy and self.tasks[verb].moves

    def header(self, verb: str, client: int, now: Round, schema: Schema, since: int = 0) -> Header:
        return Header(
            run=self.run,
            base=self.base,
            round=now.number,
            client=client,
            verb=verb,
            schema=schema.fingerprint,
            since=since,
            whole=schema.whole,
        )

    def expect(self, verb: str, client: int, now: Round, schema: Schema, kinds: frozenset[str]) -> Expect:
        plain = Expect(
            run=self.run,
            base=self.base,
            round=now.number,
            client=client,
            verb=verb,
            schema=schema,
            kinds=kinds,
        )
        if client == EVERYONE:  # the limits are the server's, for answers
            return plain
        return replace(plain, max_weight=self.limits.weight, max_norm=self.limits.norm or math.inf)


def require_finite(update: Update, name: str) -> None:
    """Raise ClientFailed (W607) where an answer holds NaN, Inf, or what no parameter can be."""
    if tensor := too_large(update.tensors, update.weight):
        found = f"NaN, Inf or a number beyond {LARGEST:g} in '{tensor}' from client '{name}'"
        raise ClientFailed(
            "W607", found, "finite numbers", "lower the learning rate or set method.train.clip"
        )
