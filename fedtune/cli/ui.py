"""fedtune ui: the runs of a folder in a browser, while they go on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "ui", help="show the runs of a folder in a browser on this machine, read only, while they go on"
    )
    parser.add_argument("runs", nargs="?", default="runs", help="the folder of runs (default: runs)")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="of loopback (default: one that is free)"
    )
    parser.set_defaults(command=ui)


def ui(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    runs = Path(options.runs).expanduser().resolve()
    if not runs.is_dir():
        raise FedtuneError(
            "R402", f"no folder '{runs}'", "a folder of runs", "begin a run, or correct the path"
        )
    from fedtune.report.write import require
    from fedtune.ui.pages import RunPages
    from fedtune.ui.serve import Server

    require()
    try:
        server = Server(RunPages(runs), options.port)
    except (OSError, OverflowError) as error:
        raise FedtuneError(
            "C103", f"--port {options.port} ({error})", "a free port of this machine", "choose another"
        ) from None
    with server:
        print(f"{server.address}\nonly from this machine, only with this address; Ctrl-C ends it", flush=True)
        server.serve_forever()
    return 0
