"""Flower's ServerApp: `flwr run . --run-config 'recipe="simulations/shakespeare.toml" set="rounds=3"'`."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.cli.common import sinks
from fedtune.quiet import quiet
from fedtune.runtime.flower import serve_context

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the recipe, with the connected nodes as clients."""
    quiet()
    serve_context(grid, context, Path(__file__).parent.parent, sinks)
