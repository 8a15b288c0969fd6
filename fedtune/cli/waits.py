"""What a command is waiting for, said at a terminal once that takes a while: a model to be read, rows to be
scored."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from fedtune import progress
from fedtune.events import Event, Progress

PATIENCE = 2.0  # seconds that nobody minds
ERASE = "\r\x1b[2K"


@contextmanager
def waiting(what: str, after: float = PATIENCE) -> Iterator[None]:
    """One line of standard error that says `what`, then how far the work is where it says so itself. It is
    there from `after` seconds on, and gone when the block ends; where that is no terminal there is none."""
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    line = Line(what, sys.stderr)
    timer = threading.Timer(after, line.begin)
    timer.daemon = True
    timer.start()
    try:
        with progress.heard_by(line.hear):
            yield
    finally:
        timer.cancel()
        line.end()


class Line:
    """Drawn by whichever thread finds that there is something to say."""

    def __init__(self, text: str, stream: TextIO) -> None:
        self.text, self.stream, self.lock = text, stream, threading.Lock()
        self.shown = self.over = False

    def begin(self) -> None:
        with self.lock:
            self.shown = not self.over
            self.draw()

    def hear(self, event: Event) -> None:
        if isinstance(event, Progress):
            with self.lock:
                of = f" {event.done:,} of {event.total:,}" if event.total else ""
                self.text = event.what + of
                self.draw()

    def end(self) -> None:
        with self.lock:
            if self.shown:
                self.stream.write(ERASE)
                self.stream.flush()
            self.over, self.shown = True, False

    def draw(self) -> None:
        if self.shown:
            self.stream.write(f"{ERASE}{self.text}"[: len(ERASE) + shutil.get_terminal_size().columns - 1])
            self.stream.flush()
