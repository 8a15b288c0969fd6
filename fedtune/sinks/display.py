"""The display that fits the place: a notebook's cell, a terminal, or plain lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedtune.events import Event


@contextmanager
def display(live: bool = True) -> Iterator[Callable[[Event], None]]:
    """A sink for one run that shows where it stands until the block ends; plain lines where `live` is false,
    as for several runs at once."""
    if live and in_notebook():
        from fedtune.sinks.notebook import Cell

        cell = Cell()
        yield cell
        cell.draw()
    elif live and is_terminal():
        from fedtune.sinks.live import Live

        with Live() as terminal:
            yield terminal
    else:
        from fedtune.sinks.console import console_sink

        yield console_sink


def is_terminal() -> bool:
    """Whether standard output can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
