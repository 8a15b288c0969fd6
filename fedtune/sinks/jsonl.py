"""events.jsonl: one JSON object a line, appended as things happen."""

from __future__ import annotations

from pathlib import Path

from fedtune.disk import disk_errors, json_text
from fedtune.events import Event, Sink


def jsonl_sink(path: Path) -> Sink:
    """A sink that appends to `path`; a line is complete or absent after a crash, and readers skip a cut last line."""

    def tell(event: Event) -> None:
        line = json_text(event.record()) + "\n"
        with disk_errors(path), path.open("a", encoding="utf-8") as handle:
            handle.write(line)

    return tell
