"""The server of a Flower app, as Flower's documentation teaches it (Message API, 1.41)."""

from __future__ import annotations

import probe  # probe
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import ROUNDS, build, evaluate, get_state, set_state

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    model = build()
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(get_state(model)), num_rounds=ROUNDS)
    set_state(model, result.arrays.to_torch_state_dict())
    accuracy = evaluate(model)
    probe.end(get_state(model), accuracy)  # probe
    print("accuracy", accuracy)
