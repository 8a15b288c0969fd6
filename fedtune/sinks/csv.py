"""A run's figures as a table that spreadsheets and plotting programs read."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

from fedtune.disk import disk_errors
from fedtune.events import Event, RoundDone, Scored, Sink
from fedtune.sinks.base import SinkSettings


class CSV(SinkSettings):
    """sink = "csv": a line for each figure: round, name, value."""

    sink: Literal["csv"] = "csv"
    path: str = "figures.csv"
    """Where to write; relative to the run's folder."""

    def open(self, folder: Path) -> Sink:
        return csv_sink(folder / Path(self.path).expanduser())


def csv_sink(path: Path) -> Sink:
    """A sink that appends to `path`, which begins with the names of the columns."""

    def tell(event: Event) -> None:
        if lines := figures(event):
            with disk_errors(path), path.open("a", encoding="utf-8", newline="") as handle:
                handle.write(text([("round", "name", "value"), *lines] if handle.tell() == 0 else lines))

    return tell


def figures(event: Event) -> list[tuple[int | str, str, float | str]]:
    """What an event says in numbers: (round, name, value)."""
    match event:
        case RoundDone():
            more = {"members": event.members, "left out": event.left_out, "seconds": event.seconds}
            traffic = {"up bytes": event.up_bytes, "down bytes": event.down_bytes}
            return [
                (event.round, name, value) for name, value in {**event.metrics, **more, **traffic}.items()
            ]
        case Scored():
            return [(event.round, f"{event.phase} {event.metric}", event.value)]
    return []


def text(lines: list[tuple[int | str, str, float | str]]) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerows(lines)
    return made.getvalue()
