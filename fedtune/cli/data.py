"""fedtune data: what the loader sees, before anything is trained: columns, lengths, labels, what stands
twice, and the first examples with the tokens that carry loss."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from fedtune.cli.init import add_guesses
from fedtune.cli.waits import waiting
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet
from fedtune.recipes import BUILT_IN


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "data", help="show rows as the loader and the model see them; reads no weights", description=__doc__
    )
    parser.add_argument("source", help="a recipe (TOML), or a file or folder of rows, whose task is guessed")
    add_guesses(parser)
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="so many of the first rows")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change one value of the recipe"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    quiet()
    from fedtune import config
    from fedtune.runtime.data_view import lines, seen

    if options.source in BUILT_IN or options.source.endswith(".toml"):
        if options.task or options.model:
            do = "use --set data.task=... or --set model.name=..."
            raise FedtuneError("C103", "--task or --model with a recipe", "neither", do)
        recipe = config.read(options.source, options.set)
    else:
        from fedtune.runtime.draft import draft

        recipe = config.parse_with(draft(options.source, options.task, options.model).tree, options.set, "")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    with waiting("reading the data"):
        view = seen(recipe, max(0, options.examples))
    for line in lines(view, colour):
        print(line)
    return 0
