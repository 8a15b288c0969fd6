"""The local carrier: every client in this process, one after the other, on one shared model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedtune.runtime.client_half import respond
from fedtune.runtime.failures import failure_of
from fedtune.runtime.protocol import Ask, Carrier, Link, Reply
from fedtune.types import Client


def local_carrier(link: Link, client: Callable[[Ask], Client], done: Callable[[Ask, Client], None], logs: Path | None = None) -> Carrier:
    """Ask members by calling their half, `client` before and `done` after it; memory does not grow with their number.

    logs  where the traceback of a client's unforeseen error goes
    """

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        for ask in asks:
            name = str(ask.client)
            try:
                world = client(ask)
                name = world.name
                reply = respond(link, world, ask)
                done(ask, world)
            except Exception as error:  # whatever it is, it is about this client
                reply = Reply(ask.client, failure=failure_of(error, name, logs))
            yield reply

    return carry
