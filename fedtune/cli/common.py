"""What several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.config import Recipe
    from fedtune.events import Sink
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


def sinks(folder: RunFolder, recipe: Recipe) -> Sink:
    """The console, events.jsonl and what the recipe adds."""
    from fedtune.sinks import sink_of
    from fedtune.sinks.console import console_sink

    return sink_of(folder.path, recipe.sinks, console_sink)
