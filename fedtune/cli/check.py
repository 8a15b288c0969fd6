"""fedtune check: what a recipe would do, before anything runs."""

from __future__ import annotations

import argparse
from typing import Any

from fedtune.cli.common import add_recipe
from fedtune.cli.waits import waiting
from fedtune.quiet import quiet


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="show the resolved recipe, clients, bytes, memory and who sees what; reads no weights",
        description=__doc__,
    )
    add_recipe(parser)
    parser.add_argument(
        "--resolved", action="store_true", help="also print the whole resolved recipe as TOML"
    )
    parser.set_defaults(command=check)


def check(options: argparse.Namespace) -> int:
    """Print the report; the first mistake ends it with one sentence."""
    from fedtune.config import read

    recipe = read(options.recipe, options.set)
    if options.resolved:
        import tomli_w

        print(tomli_w.dumps(recipe.model_dump(mode="json")))
    quiet()
    with waiting("reading the data"):
        from fedtune import api
        from fedtune.deploy.preflight import remarks

        said = [*api.check(recipe), *remarks(recipe)]
    print("\n".join(said))
    return 0
