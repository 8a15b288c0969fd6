"""fedtune simulate: a whole federation on this machine."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from fedtune.cli.common import add_recipe, add_workers
from fedtune.cli.showing import add_showing, shown
from fedtune.quiet import quiet

STARTED = time.time()  # the nearest thing to the start of the command


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate", help="run a whole federation on this machine", description=__doc__
    )
    add_recipe(parser)
    parser.add_argument(
        "--engine",
        choices=("local", "flower"),
        default="local",
        help="local: on this machine's cores; flower: Flower's simulation engine (Ray)",
    )
    parser.add_argument(
        "--ray",
        default="",
        metavar="ADDRESS",
        help="with --engine flower: a Ray cluster that is there already (host:port, or auto), instead of one "
        "of our own; default: RAY_ADDRESS, where that is set",
    )
    add_workers(parser)
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)"
    )
    add_showing(parser)
    parser.set_defaults(command=simulate)


def simulate(options: argparse.Namespace) -> int:
    """Read the recipe, run it, show what happens."""
    from fedtune.config import read

    recipe = read(options.recipe, options.set)
    quiet()
    stem = Path(options.recipe).stem if options.recipe else "demo"
    with shown(options) as tell:
        from fedtune import api

        result = api.simulate(
            recipe,
            runs=options.runs,
            engine=options.engine,
            ray=options.ray,
            workers=options.workers,
            on_event=tell,
            stem=stem,
            began=STARTED,
        )
    if not (options.quiet or options.json):
        print(
            "\n".join(["", "next:", *(f"  {line}" for line in next_steps(recipe.data.task, result.folder))])
        )
    return 0


def next_steps(task: str, folder: Path) -> list[str]:
    """What one does with a finished run."""
    relative = os.path.relpath(folder)
    place = str(folder) if relative.startswith("..") else relative
    asked = {f"fedtune chat {place}": "base and tuned model side by side"}
    if task in ("classify", "image-classify"):
        asked = {f"fedtune predict {place} FILE": "what the model makes of new rows"}
    steps = {
        f"fedtune report {place}": "a page with pictures",
        **asked,
        f"fedtune export {place} --to DIR": "the tuned model, for other programs",
    }
    wide = max(map(len, steps))
    return [f"{command:<{wide}}  # {about}" for command, about in steps.items()]
