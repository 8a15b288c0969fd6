"""Flower's ClientApp of a deployment: both answers come from the worker beside the SuperNode. Light, because
a process lives for one message."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import FedtuneError
from fedtune.flower.worker_socket import through

app = ClientApp()


@app.query("site")  # type: ignore[untyped-decorator]  # flwr has no types
def site(message: Message, context: Context) -> Message:
    """Which member this node is, signed by it."""
    nonce = bytes(message.content["site"]["nonce"]).hex()
    said = through(str(context.node_config["worker"]), {"what": "site", "nonce": nonce})
    return Message(
        RecordDict({"site": ConfigRecord({"sealed": str(said["sealed"]).encode()})}), reply_to=message
    )


@app.train("ticket")  # type: ignore[untyped-decorator]  # flwr has no types
def do(message: Message, context: Context) -> Message:
    """A ticket's outcome as code and number; the update itself has gone over the exchange."""
    ticket = bytes(message.content["ticket"]["ticket"]).decode()
    try:
        said: dict[str, Any] = through(
            str(context.node_config["worker"]), {"what": "ticket", "ticket": ticket}
        )
    except FedtuneError as error:  # as an outcome: of an exception Flower would send the words
        said = {"code": error.code}
    return Message(
        RecordDict({"outcome": ConfigRecord({part: str(text) for part, text in said.items()})}),
        reply_to=message,
    )
