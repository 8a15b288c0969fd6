"""events.jsonl: one JSON object a line, appended as things happen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fedtune.disk import disk_errors, json_text
from fedtune.events import Event, Sink
from fedtune.sinks.base import SinkSettings


class JSONLines(SinkSettings):
    """sink = "jsonl": every event once more, beside the run folder's own events.jsonl."""

    sink: Literal["jsonl"] = "jsonl"
    path: str
    """Where to append; relative to the run's folder."""

    def open(self, folder: Path) -> Sink:
        return jsonl_sink(folder / Path(self.path).expanduser())


def jsonl_sink(path: Path, most: int = 0) -> Sink:
    """A sink that appends to `path`; a line is complete or absent after a crash, and readers skip a cut last
    line.

    most  bytes after which the file is begun anew, and what it was kept as NAME.1; 0: it grows, as a run's
          own events do
    """

    def tell(event: Event) -> None:
        line = json_text(event.record()) + "\n"
        with disk_errors(path):
            if most and path.exists() and path.stat().st_size > most:
                path.replace(path.with_name(f"{path.name}.1"))
        with disk_errors(path), path.open("a", encoding="utf-8") as handle:
            handle.write(line)

    return tell
