"""What several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.events import Event, Sink
    from fedtune.runtime.folder import RunFolder


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The two arguments that describe a federation."""
    parser.add_argument("recipe", nargs="?", help="a recipe (TOML); without one, the built-in federation")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one value of the recipe, e.g. --set rounds=3",
    )


def sinks(folder: RunFolder) -> Sink:
    """The console and events.jsonl."""
    from fedtune.sinks.console import console_sink
    from fedtune.sinks.jsonl import jsonl_sink

    write = jsonl_sink(folder.path / "events.jsonl")

    def tell(event: Event) -> None:
        write(event)
        console_sink(event)

    return tell
