"""The local transport: every client in this process, one after the other, on one shared model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.runtime.client_half import respond
from fedtune.runtime.failures import failure_of
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.types import Client


def local_transport(
    link: Link, client: Callable[[Ask], Client], done: Callable[[Ask, Client], None], logs: Path | None = None
) -> Transport:
    """Ask members by calling their half, `client` before and `done` after it; memory does not grow with their
    number.

    logs  where the traceback of a client's unforeseen error goes
    """

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        for ask in asks:
            name, began = str(ask.client), time.monotonic()
            try:
                workspace = client(ask)
                name = workspace.name
                reply = respond(link, workspace, ask)
                done(ask, workspace)
            except Exception as error:  # whatever it is, it is about this client
                reply = Reply(ask.client, failure=failure_of(error, name, logs))
            yield replace(reply, seconds=time.monotonic() - began)

    return carry
