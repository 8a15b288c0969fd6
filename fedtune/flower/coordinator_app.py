"""Flower's ServerApp of a deployment: one run, in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid as FlowerGrid
from flwr.serverapp import ServerApp

from fedtune.flower.messages import Grid
from fedtune.quiet import quiet
from fedtune.runtime.folder import RunFolder, existing


def coordinator_app(conduct: Callable[[Grid, RunFolder], object]) -> ServerApp:
    """An app that conducts the run whose folder the submitted project names."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]  # flwr has no types
    def main(grid: FlowerGrid, context: Context) -> None:
        quiet()
        conduct(grid, existing(Path(str(context.run_config["folder"]))))

    return app
