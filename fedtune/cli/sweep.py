"""fedtune sweep: one recipe with other settings and seeds, and a table of what came out. The same command
goes on with a sweep that was killed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedtune.cli.common import add_recipe
from fedtune.errors import FedtuneError
from fedtune.plain import plain
from fedtune.quiet import quiet


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep", help="run a recipe with other settings and seeds, and compare", description=__doc__
    )
    add_recipe(parser)
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="PATH=VALUE,VALUE",
        help="values to try, such as method.adapter.rank=4,8,16; several --grid give every combination",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each, from the recipe's seed on"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once, each in a process of its own"
    )
    parser.add_argument(
        "--halve",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="ETA",
        help="stop losers early: of each step the best 1/ETA go on for ETA times as many rounds (default: 3)",
    )
    parser.add_argument(
        "--trials", type=int, default=0, metavar="N", help="instead of a grid: Optuna suggests N"
    )
    parser.add_argument(
        "--sample",
        action="append",
        default=[],
        metavar="PATH=LOW..HIGH",
        help="with --trials: what is drawn; log:LOW..HIGH on a scale of factors, VALUE,VALUE one of these",
    )
    parser.add_argument(
        "--to", default="", metavar="DIR", help="the sweep's folder (default: sweeps/ and the recipe)"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    check(options)
    from fedtune import config
    from fedtune.sinks.display import display
    from fedtune.sweeps.plan import grid
    from fedtune.sweeps.sweep import Plan, sweep
    from fedtune.sweeps.table import as_text

    recipe = config.read(options.recipe, options.set)
    quiet()
    stem = Path(options.recipe).stem if options.recipe else "demo"
    folder = Path(options.to or f"sweeps/{stem}").expanduser().resolve()
    settings = [] if options.trials else grid(options.grid)
    plan = Plan(recipe, settings, options.sample, options.trials, options.seeds, options.jobs, options.halve)
    with display() as tell:
        rows = sweep(plan, folder, tell)
    print("\n".join(["", *map(plain, as_text(rows)), f"table.csv, table.json and runs/ in {folder}"]))
    if not any(row.results for row in rows):
        return 2
    print(f"side by side: fedtune report {options.to or f'sweeps/{stem}'}")
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises C103 for arguments that do not go together."""
    wrong = ""
    if options.seeds < 1 or options.jobs < 1 or options.trials < 0:
        wrong = "--seeds, --jobs or --trials below 1"
    elif options.halve and options.halve < 2:
        wrong = f"--halve {options.halve}"
    elif options.trials and (options.grid or options.halve or not options.sample):
        wrong = "--trials without --sample, or with --grid or --halve"
    elif options.sample and not options.trials:
        wrong = "--sample without --trials"
    if wrong:
        expected = "--grid and --halve of 2 or more, or --trials with --sample"
        raise FedtuneError("C103", wrong, expected, "correct the command")
