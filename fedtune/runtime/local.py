"""The local carrier: every client in this process, one after the other, on one shared model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedtune.errors import ClientFailed, Refused
from fedtune.runtime.cohort import Ask, Carrier, Link, Reply, respond
from fedtune.types import Client


def local_carrier(link: Link, client: Callable[[Ask], Client], done: Callable[[Ask, Client], None]) -> Carrier:
    """Ask members by calling their half, `client` before and `done` after it; memory does not grow with their number."""

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        for ask in asks:
            try:
                world = client(ask)
                reply = Reply(ask.client, respond(link, world, ask), said=link.chain.said)
                done(ask, world)
                yield reply
            except (ClientFailed, Refused) as error:
                yield Reply(ask.client, failure=error)

    return carry
