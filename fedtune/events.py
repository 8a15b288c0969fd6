"""What a run tells while it runs. Sinks receive these; nothing else prints or logs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """Base of all events; `at` is seconds since the epoch."""

    at: float = field(default_factory=time.time, kw_only=True)

    def record(self) -> dict[str, Any]:
        """A flat JSON record with the event's name."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class RunStarted(Event):
    run: str
    folder: str
    rounds: int
    clients: int
    trainable: int
    total: int
    resumed_after: int = 0
    threads: str = ""  # how many torch uses, and why


@dataclass(frozen=True)
class Noted(Event):
    """Something a user should know that is no mistake: truncated texts, rows left out, a choice made by
    `auto`."""

    text: str


@dataclass(frozen=True)
class Waiting(Event):
    """What the run is busy with now, where that may take longer than a moment."""

    text: str


@dataclass(frozen=True)
class Truncated(Event):
    """Texts longer than the recipe's max_length: `cut` were shortened, `left_out` kept nothing that could be
    learned from."""

    whose: str
    rows: int
    cut: int
    left_out: int
    max_length: int


@dataclass(frozen=True)
class Chose(Event):
    """What a client's chain chose by itself, and why."""

    round: int
    client: int
    name: str
    text: str


@dataclass(frozen=True)
class ClientDone(Event):
    round: int
    client: int
    name: str
    weight: float
    up_bytes: int
    down_bytes: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class ClientLeftOut(Event):
    """A member whose answer does not count in this round, and why."""

    round: int
    client: int
    name: str
    code: str
    text: str


@dataclass(frozen=True)
class RoundDone(Event):
    round: int
    members: int
    left_out: int
    up_bytes: int
    down_bytes: int
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Scored(Event):
    """A score on held-out rows. phase: base, federated, local:<client>, centralised."""

    phase: str
    round: int
    metric: str
    value: float
    loss: float


@dataclass(frozen=True)
class Alarm(Event):
    """Something after a round that a client may have done on purpose. what: canary, trigger, refusals."""

    round: int
    what: str
    text: str


@dataclass(frozen=True)
class RunDone(Event):
    result: Mapping[str, Any]


class Sink(Protocol):
    """Where events go."""

    def __call__(self, event: Event) -> None: ...
