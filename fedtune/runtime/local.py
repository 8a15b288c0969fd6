"""The local carrier: every client in this process, one after the other, on one shared model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedtune.errors import ClientFailed, Refused
from fedtune.runtime.cohort import Ask, Carrier, Link, Reply, respond
from fedtune.types import Client


def local_carrier(link: Link, client: Callable[[int], Client]) -> Carrier:
    """Ask members by calling their half; memory does not grow with their number."""

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        for ask in asks:
            try:
                yield Reply(ask.client, respond(link, client(ask.client), ask))
            except (ClientFailed, Refused) as error:
                yield Reply(ask.client, failure=error)

    return carry
