"""fedtune status --watch: the same lines again and again, until no run in them goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedtune.sinks.display import is_terminal

EVERY = 2.0  # seconds between two looks
GOING_ON = (" left", "no round committed yet")  # how the line of a run ends that is not through


def watch(look: Callable[[], list[str]], every: float = EVERY) -> None:
    """Show what `look` says until no line speaks of a run that goes on: in place at a terminal, elsewhere
    what is new."""
    if not is_terminal():
        before: list[str] = []
        while True:
            lines = look()
            for line in lines:
                if line not in before:
                    print(line, flush=True)
            if not goes_on(lines):
                return
            before = lines
            time.sleep(every)
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as display:
        while True:
            lines = look()
            display.update(Text("\n".join(lines)), refresh=True)
            if not goes_on(lines):
                return
            time.sleep(every)


def goes_on(lines: list[str]) -> bool:
    """
    >>> goes_on(["a: round 1 of 3, about 4 s left"]), goes_on(["a: round 3 of 3, finished"])
    (True, False)
    """
    return any(line.endswith(GOING_ON) for line in lines)
