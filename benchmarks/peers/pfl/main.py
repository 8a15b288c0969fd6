"""FedAvg on pfl-research 0.6, after its benchmark for language models."""

from __future__ import annotations

import functools
import os
import types
from typing import Any

import numpy as np
import probe  # probe
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.restore_training import RestoreTrainingCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from task import CLIENTS, RATE, ROUNDS, SIZE, STEPS, build, evaluate, get_state, load, tokenizer


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, client: int) -> None:
        self.ids, self.labels = load("train.jsonl", client)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"input_ids": self.ids[at], "labels": int(self.labels[at])}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(tokenizer.pad(rows, return_tensors="pt"))


def loss(self: Any, **batch: Any) -> Any:
    self.train()
    return self.forward(**batch)["loss"]


def metrics(self: Any, **batch: Any) -> dict[str, Any]:
    self.eval()
    hits = (self.forward(**batch)["logits"].argmax(-1) == batch["labels"]).sum().item()
    return {"accuracy": Weighted(hits, len(batch["labels"]))}


np.random.seed(1)
net = build()
net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
model = PyTorchModel(
    model=net,
    local_optimizer_create=functools.partial(torch.optim.AdamW, weight_decay=0.0),
    central_optimizer=torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1.0),
)
inner, turns = model.do_multiple_epochs_of, dict.fromkeys(range(CLIENTS), 0)  # probe


def watched(user: Any, *args: Any, **more: Any) -> Any:  # probe
    client = int(user.user_id)  # probe
    turns[client] += 1  # probe
    probe.begin(client, turns[client])  # probe
    out = inner(user, *args, **more)  # probe
    with torch.no_grad():  # probe
        for value, new in zip([p for p in net.parameters() if p.requires_grad],  # probe
                              probe.spoiled(dict(enumerate(p for p in net.parameters() if p.requires_grad)),  # probe
                                            client, turns[client]).values(), strict=True):  # probe  # fmt: skip
            value.copy_(new)  # probe
    return out  # probe


model.do_multiple_epochs_of = watched  # probe
users = {
    client: PyTorchDataDataset(Rows(client), user_id=str(client), collate_fn=collate, shuffle=True)
    for client in range(CLIENTS)
}
algorithm = FederatedAveraging()
algorithm.run(
    algorithm_params=NNAlgorithmParams(
        ROUNDS, evaluation_frequency=ROUNDS + 1, train_cohort_size=CLIENTS, val_cohort_size=None
    ),
    backend=SimulatedBackend(
        training_data=FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users))),
        val_data=None,
    ),
    model=model,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=None, local_num_steps=STEPS, local_learning_rate=RATE, local_batch_size=SIZE
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=32),
    callbacks=[RestoreTrainingCallback([model, algorithm], os.environ["PEERS_WORK"])],
)
accuracy = evaluate(net)
probe.end(get_state(net), accuracy)  # probe
print("accuracy", accuracy)
