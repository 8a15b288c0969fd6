"""fedtune compare: runs beside one another: what differs in their recipes, and in what came of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedtune.disk import json_text
from fedtune.plain import plain


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "compare", help="show what differs between runs, in recipes and in results", description=__doc__
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from fedtune.runtime.compare import compared, table

    content = compared([Path(run).expanduser().resolve() for run in options.runs])
    if options.json:
        print(json_text(content, indent=2))
    else:
        print("\n".join(plain(line) for line in table(content)))
    return 0
