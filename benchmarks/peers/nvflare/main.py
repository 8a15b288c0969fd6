"""FedAvg on NVIDIA FLARE 2.9: its recipe, in its simulator."""

from __future__ import annotations

import os
from pathlib import Path

import probe  # probe
import torch
from model import AdapterModel  # noqa: F401  the recipe names it
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from task import CLIENTS, ROUNDS, build, evaluate, set_state

if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    recipe = FedAvgRecipe(
        name="peers", min_clients=CLIENTS, num_rounds=ROUNDS, train_script="client.py",
        model={"class_path": "model.AdapterModel", "args": {}},
    )  # fmt: skip
    recipe.add_server_file("model.py")
    run = recipe.execute(SimEnv(num_clients=CLIENTS, workspace_root=os.environ["PEERS_WORK"]))
    saved = Path(run.get_result(), "server/simulate_job/app_server/FL_global_model.pt")
    state = {
        name: torch.as_tensor(value) for name, value in torch.load(saved, weights_only=True)["model"].items()
    }
    model = build()
    set_state(model, state)
    accuracy = evaluate(model)
    probe.end(state, accuracy)  # probe
    print("accuracy", accuracy)
