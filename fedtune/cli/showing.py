"""How a command shows what happens: live at a terminal, as lines elsewhere, for programs, or not at all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedtune.events import Event, Progress


def add_showing(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quiet", action="store_true", help="print nothing but mistakes")
    chosen.add_argument("--json", action="store_true", help="print every event as one JSON object a line")


@contextmanager
def shown(options: argparse.Namespace, live: bool = True) -> Iterator[Callable[[Event], None]]:
    """Where events go; `live` says whether they are of one run, whose progress can be drawn."""
    if options.quiet:
        yield lambda event: None
    elif options.json:
        yield json_line
    else:
        from fedtune.sinks.display import display

        with display(live) as tell:
            tell(Progress("starting: loading libraries", 0, 0))  # seconds, before a run can speak for itself
            yield tell


def json_line(event: Event) -> None:
    from fedtune.disk import json_text

    print(json_text(event.record()), flush=True)
