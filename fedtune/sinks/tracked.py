"""What a tracker is given of a run, the same for all trackers: figures by round, each of them once.

A run that was killed goes on in another process and tells some things again. So what a tracker is about to be
told, and by which of its own names it knows the run, is remembered in a file of the run's folder first: no
step comes twice. What it missed stands in events.jsonl and is told when the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedtune.disk import json_text, write_atomic
from fedtune.events import ClientDone, Event, RoundDone, RunDone, RunStarted, Scored, event_of
from fedtune.overrides import flat

CLIENTS = 100  # of whom a tracker is told singly; more would drown everything else


class Tracker(Protocol):
    """A tracker's own library, as far as a run needs it."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a round; 0 is before the first."""

    def close(self, result: Mapping[str, Any]) -> None:
        """The run is through; its result's figures are what it is compared by."""


# (the tracker's own name of the run, "" for a new one; the run's name; its folder) -> tracker, its name there
Opens = Callable[[str, str, Path], tuple[Tracker, str]]


@dataclass
class Tracked:
    """A sink that hands figures on to one tracker. It is opened with the first event of a run, since only
    then is it known that there will be one.

    path  where is remembered what has been told
    """

    path: Path
    folder: Path
    opens: Opens
    clients: bool = True
    tracker: Tracker | None = None
    known: str = ""
    last: int = 0  # round up to which all was told
    told: set[str] = field(default_factory=set)  # scores that were told
    waiting: dict[str, float] = field(default_factory=dict)  # figures of clients in the round that goes on

    def __post_init__(self) -> None:
        if self.path.exists():
            said = json.loads(self.path.read_text(encoding="utf-8"))
            self.known, self.last, self.told = said["run"], said["round"], set(said["scores"])

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.begin(event.run)
                self.catch_up()
            case ClientDone() if self.clients and event.client < CLIENTS:
                self.waiting |= {f"clients/{event.name}/{k}": v for k, v in of_client(event).items()}
            case RoundDone():
                if event.round > self.last:
                    self.last = event.round
                    self.give(event.round, {**of_round(event), **self.waiting})
                self.waiting = {}
            case Scored():
                score = f"{event.phase} in round {event.round}"
                if score not in self.told:
                    self.told.add(score)
                    loss = f"{event.phase}/loss"
                    self.give(event.round, {f"{event.phase}/{event.metric}": event.value, loss: event.loss})
            case RunDone() if self.tracker is not None:
                self.tracker.close(event.result)
                self.tracker = None

    def begin(self, run: str) -> None:
        if self.tracker is None:
            self.tracker, self.known = self.opens(self.known, run, self.folder)
            self.remember()

    def catch_up(self) -> None:
        """Tell what happened before this process began, as far as it was not told."""
        path = self.folder / "events.jsonl"
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError):  # half a line
                event = event_of(json.loads(text))
                if isinstance(event, (ClientDone, RoundDone, Scored)):
                    self(event)

    def give(self, step: int, values: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.remember()
            known = {
                name: value for name, value in values.items() if value is not None
            }  # JSON's word for NaN
            self.tracker.figures(
                step, {n: float(value) for n, value in known.items() if math.isfinite(value)}
            )

    def remember(self) -> None:
        state = {"run": self.known, "round": self.last, "scores": sorted(self.told)}
        write_atomic(self.path, json_text(state).encode())


def of_round(event: RoundDone) -> dict[str, float]:
    """
    >>> of_round(RoundDone(1, 4, 1, 10, 20, 0.5, {"loss": 0.75}))["round/loss"]
    0.75
    """
    more = {
        "members": event.members,
        "left out": event.left_out,
        "up bytes": event.up_bytes,
        "down bytes": event.down_bytes,
        "seconds": event.seconds,
    }
    return {f"round/{name}": value for name, value in {**event.metrics, **more}.items()}


def of_client(event: ClientDone) -> dict[str, float]:
    more = {"weight": event.weight, "up bytes": float(event.up_bytes), "seconds": event.seconds}
    return {**event.metrics, **more}


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The result's own figures, as a tracker lists them beside other runs'.

    >>> numbers({"federated": 0.5, "rounds": 3, "method": "fedpeft", "best": None, "done": True})
    {'federated': 0.5, 'rounds': 3.0}
    """
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def settings(folder: Path) -> dict[str, Any]:
    """The run's recipe, flat: what a tracker calls parameters."""
    path = folder / "config.json"
    return flat(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
