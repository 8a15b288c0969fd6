"""The app on Flower's simulation engine, a core an actor."""

from __future__ import annotations

from client_app import app as client
from flwr.simulation import run_simulation
from server_app import app as server
from task import CLIENTS

resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS, backend_config=resources)
