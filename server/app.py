"""Flower's ServerApp: `flwr run . --run-config 'recipe="simulations/shakespeare.toml" set="rounds=3"'`."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.cli.common import sinks
from fedtune.flower.server_app import serve_context
from fedtune.quiet import quiet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the recipe, with the connected nodes as clients."""
    quiet()
    serve_context(grid, context, Path(__file__).parent.parent, sinks)
