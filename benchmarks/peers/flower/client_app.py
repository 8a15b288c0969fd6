"""The client of a Flower app, as Flower's documentation teaches it (Message API, 1.41)."""

from __future__ import annotations

import probe  # probe
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto  # probe
from task import build, load, set_state, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    rows, model = load("train.jsonl", client), build()
    set_state(model, message.content["arrays"].to_torch_state_dict())
    answer = train(model, rows, client, int(message.content["config"]["server-round"]))
    metrics = MetricRecord({"num-examples": len(rows[1])})
    content = RecordDict({"arrays": ArrayRecord(answer), "metrics": metrics})
    probe.note("sent", bytes=len(recorddict_to_proto(content).SerializeToString()))  # probe
    return Message(content=content, reply_to=message)
