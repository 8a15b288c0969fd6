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
class Said(Event):
    """What a program of a deployment says to whoever looks after it."""

    text: str


@dataclass(frozen=True)
class Waiting(Event):
    """What the run is busy with now, where that may take longer than a moment."""

    text: str


@dataclass(frozen=True)
class Progress(Event):
    """How far the work of the moment is: `done` of `total` (0: nobody knows) steps, texts or batches; `loss`
    of the last step in nats. For those who look now: events.jsonl and a recipe's sinks have none."""

    what: str
    done: int
    total: int
    loss: float | None = None


@dataclass(frozen=True)
class RoundStarted(Event):
    """The members of a round are asked from now on."""

    round: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Answered(Event):
    """An answer of a client elsewhere has come, `seconds` after the question; ClientDone or ClientLeftOut
    says what became of it, in ascending order of the clients."""

    round: int
    client: int
    name: str
    seconds: float


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
    seconds: float = 0.0  # its own work where it is in this process, else from the question to the answer


@dataclass(frozen=True)
class ClientLeftOut(Event):
    """A member whose answer does not count in this round, and why."""

    round: int
    client: int
    name: str
    code: str
    text: str


@dataclass(frozen=True)
class Shortened(Event):
    """An answer that would have moved the state further than limits.clip allows: it counts for as much as
    that."""

    round: int
    client: int
    name: str
    norm: float
    limit: float


@dataclass(frozen=True)
class Contributed(Event):
    """What each member contributed to a round's answers to a verb: norm, cosine to the others' mean, and how
    far the mean moves without it (`alone`)."""

    round: int
    verb: str
    members: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RoundDone(Event):
    round: int
    members: int
    left_out: int
    up_bytes: int
    down_bytes: int
    seconds: float
    metrics: Mapping[str, float]
    clients_seconds: float = 0.0  # of `seconds`: until answers came


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
    """Something after a round that a client may have done on purpose. what: canary, trigger, refusals,
    influence."""

    round: int
    what: str
    text: str


@dataclass(frozen=True)
class RunDone(Event):
    result: Mapping[str, Any]


def event_of(record: Mapping[str, Any]) -> Event | None:
    """The event of a record; None for one that this version does not know.

    >>> event_of(Noted("so", at=1.0).record())
    Noted(at=1.0, text='so')
    """
    kind = globals().get(str(record.get("event")))
    if not (isinstance(kind, type) and issubclass(kind, Event)):
        return None
    try:
        return kind(**{name: value for name, value in record.items() if name != "event"})
    except TypeError:
        return None


class Sink(Protocol):
    """Where events go."""

    def __call__(self, event: Event) -> None: ...
