"""What a person at a notebook sees: the lines so far and where the run stands now, drawn anew in one cell."""

from __future__ import annotations

import html
import time
from importlib import import_module
from typing import Any

from fedtune.events import Event, Progress, RunDone, Waiting
from fedtune.plain import plain
from fedtune.sinks.console import line, shown
from fedtune.sinks.live import clients_in_words, figures_in_words, now_in_words
from fedtune.sinks.standing import Standing

EVERY = 0.5  # seconds between two drawings
MOST = 200  # lines that are kept


class Cell:
    """A sink that draws in the cell in which it was made."""

    def __init__(self) -> None:
        display: Any = import_module("IPython.display")  # has no types
        self.html = display.HTML
        self.handle = display.display(self.html(""), display_id=True)
        self.standing, self.lines, self.drawn = Standing(), list[str](), 0.0

    def __call__(self, event: Event) -> None:
        self.standing.told(event)
        text = "" if isinstance(event, (Progress, Waiting)) else line(event)
        if text:
            self.lines = [*self.lines, shown(event, text)][-MOST:]
        if isinstance(event, RunDone) or time.monotonic() > self.drawn + EVERY:
            self.draw()

    def draw(self) -> None:
        self.drawn = time.monotonic()
        self.handle.update(self.html(page(self.standing, self.lines)))


def page(standing: Standing, lines: list[str]) -> str:
    """The cell's HTML; every text is escaped."""
    now = ""
    if standing.rounds and not standing.finished:
        now = (
            f'<progress max="{standing.rounds}" value="{standing.committed}"></progress> round '
            f"{standing.round} of {standing.rounds} · {html.escape(clients_in_words(standing))}<br>"
            f"{html.escape(figures_in_words(standing))}<br>"
        )
    words = html.escape(plain(now_in_words(standing)))
    said = html.escape("\n".join(lines))
    return f"<pre>{said}</pre><div role=status>{now}<small>{words}</small></div>"
