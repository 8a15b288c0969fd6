"""fedtune simulate: a whole federation on this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fedtune.cli.common import add_recipe, sinks
from fedtune.quiet import quiet

STARTED = time.time()  # the nearest thing to the start of the command


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("simulate", help="run a whole federation on this machine", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--engine", choices=("local", "flower"), default="local", help="local: in this process; flower: Flower's simulation engine (Ray)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)")
    parser.set_defaults(command=simulate)


def simulate(options: argparse.Namespace) -> int:
    """Read the recipe, make the run folder, run."""
    from fedtune.config import decided, read

    recipe = read(options.recipe, options.set)
    quiet()
    from fedtune.errors import FedtuneError
    from fedtune.runtime.folder import create, discard_if_empty
    from fedtune.runtime.run import run

    recipe = decided(recipe)
    folder = create(Path(options.runs).expanduser(), recipe.name, Path(options.recipe).stem if options.recipe else "demo")
    try:
        folder.begin(recipe)
        if options.engine == "flower":
            from fedtune.flower.simulation import simulation

            simulation(recipe, folder, sinks(folder))
        else:
            run(recipe, folder, sinks(folder), began=STARTED)
    except FedtuneError:
        discard_if_empty(folder)
        raise
    return 0
