"""A site's script for NVIDIA FLARE 2.9 (client API)."""

from __future__ import annotations

import nvflare.client as flare
import probe  # probe
import torch
from nvflare.fuel.utils import fobs  # probe
from task import build, load, set_state, train

flare.init()
client = int(flare.system_info()["site_name"].split("-")[1]) - 1
model, rows = build(), load("train.jsonl", client)
while flare.is_running():
    received = flare.receive()
    set_state(model, {name: torch.as_tensor(value) for name, value in received.params.items()})
    answer = train(model, rows, client, received.current_round + 1)
    probe.note(
        "sent", bytes=len(fobs.dumps({name: value.numpy() for name, value in answer.items()}))
    )  # probe
    flare.send(flare.FLModel(params=answer, meta={"NUM_STEPS_CURRENT_ROUND": len(rows[1])}))
