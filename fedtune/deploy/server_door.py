"""Flower's ServerApp of a deployment, named by the app that fedtune server submits (app.py)."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.deploy.conduct import conduct
from fedtune.quiet import quiet
from fedtune.runtime.folder import existing

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]  # flwr has no types
def main(grid: Grid, context: Context) -> None:
    """One run, in its folder."""
    quiet()
    conduct(grid, existing(Path(str(context.run_config["folder"]))))
