"""Where a run stands, put together from its events: what a display, a notebook and a page show of it."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, field

from fedtune.events import (
    Answered,
    ClientDone,
    ClientLeftOut,
    Event,
    Progress,
    RoundDone,
    RoundStarted,
    RunDone,
    RunStarted,
    Scored,
    Waiting,
)

BARS = "▁▂▃▄▅▆▇█"
SLOW = 2.0  # times the median of the others, from which a client is called slow
SHOWN = 24  # values of a trend


@dataclass
class Standing:
    """A run as it stands. `told` takes events in their order; everything else is read only."""

    rounds: int = 0
    round: int = 0  # the one that is going on, or was the last
    members: int = 0
    waited_for: list[str] = field(default_factory=list)
    what: str = ""  # is going on now
    progress: Progress | None = None
    since: float = field(default_factory=time.time)  # when `what` began
    losses: list[float] = field(default_factory=list)
    scores: dict[str, tuple[str, float]] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0
    took: dict[str, float] = field(default_factory=dict)  # client -> seconds in this round
    round_seconds: list[float] = field(default_factory=list)
    round_began: float | None = None
    resumed_after: int = 0
    finished: bool = False

    def told(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.rounds, self.round, self.resumed_after = (
                    event.rounds,
                    event.resumed_after,
                    event.resumed_after,
                )
            case RoundStarted():
                self.round, self.members, self.took = event.round, len(event.names), {}
                self.waited_for, self.round_began = list(event.names), event.at
                self._begin("waiting for clients", event.at)
            case Waiting():
                self._begin(event.text, event.at)
            case Progress():
                if self.progress is None or self.progress.what != event.what:
                    self.since = event.at
                self.progress = event
            case Answered():
                self._came(event.name, event.seconds)
            case ClientDone():
                self._came(event.name, event.seconds)
                self.up_bytes, self.down_bytes = (
                    self.up_bytes + event.up_bytes,
                    self.down_bytes + event.down_bytes,
                )
                self.progress = None
            case ClientLeftOut():
                self._came(event.name)
            case RoundDone():
                self.round_seconds.append(event.seconds)
                self.waited_for, self.round_began = [], None
                loss = event.metrics.get("loss")  # None where it was NaN and JSON came between
                self.losses += [] if loss is None else [loss]
                self._begin("", event.at)
            case Scored() if not event.phase.startswith("local:"):
                self.scores[event.phase] = (event.metric, event.value)
            case RunDone():
                self.finished = True
                self._begin("", event.at)

    def _begin(self, what: str, at: float) -> None:
        self.what, self.since, self.progress = what, at, None

    def _came(self, name: str, seconds: float = 0.0) -> None:
        with contextlib.suppress(ValueError):
            self.waited_for.remove(name)
        if seconds:
            self.took[name] = seconds

    @property
    def answered(self) -> int:
        return self.members - len(self.waited_for)

    @property
    def committed(self) -> int:
        return self.resumed_after + len(self.round_seconds)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Of the rounds, by the median of those that are done; None before the first."""
        if not self.round_seconds or self.finished:
            return None
        each = statistics.median(self.round_seconds)
        gone = (time.time() if now is None else now) - self.round_began if self.round_began else 0.0
        return max(0.0, each * (self.rounds - self.committed) - min(gone, each))

    def slow(self) -> tuple[str, float, float] | None:
        """The slowest client of the round, where it is far slower than the others: name, seconds, their
        median."""
        if len(self.took) < 3:
            return None
        name = max(self.took, key=lambda one: self.took[one])
        usual = statistics.median(seconds for one, seconds in self.took.items() if one != name)
        return (name, self.took[name], usual) if self.took[name] > SLOW * usual + 0.5 else None

    @property
    def trend(self) -> str:
        return sparkline(self.losses)


def sparkline(values: list[float], most: int = SHOWN) -> str:
    """The last values as bars, the lowest to the highest.

    >>> sparkline([3.0, 2.0, 1.0]), sparkline([1.0, 1.0]), sparkline([])
    ('█▅▁', '▁▁', '')
    """
    shown = [value for value in values if value == value][-most:]  # NaN is no height
    if not shown:
        return ""
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in shown)


def duration(seconds: float) -> str:
    """
    >>> duration(4.2), duration(75), duration(7300), duration(200_000)
    ('4 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    for unit, below, size, small in (("d", "h", 86_400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // small)} {below}"
    return f"{seconds:.0f} s"
