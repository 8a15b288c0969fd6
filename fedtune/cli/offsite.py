"""fedtune offsite: what the owner of a model gives away in its place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedtune.cli.common import add_recipe
from fedtune.cli.waits import waiting
from fedtune.quiet import quiet


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "offsite",
        help="write the emulator of a recipe's model, for sites to use as theirs (method offsite)",
        description="Writes a folder that sites name with fedtune client --model; the model itself stays.",
    )
    add_recipe(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.set_defaults(command=offsite)


def offsite(options: argparse.Namespace) -> int:
    from fedtune.config import read

    recipe = read(options.recipe, options.set)
    quiet()
    from fedtune.runtime.emulator import write_emulator

    with waiting("reading the model"):
        said = write_emulator(recipe, Path(options.to).expanduser().resolve())
    print("\n".join(said))
    return 0
