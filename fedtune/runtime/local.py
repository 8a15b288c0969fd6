"""The local transport: every client in this process, on one shared model; one after the other, or several in
one pass where the recipe says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.panics import panics_as_errors
from fedtune.runtime.client_half import respond, respond_together
from fedtune.runtime.failures import failure_of
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.types import Client


def local_transport(
    link: Link, client: Callable[[Ask], Client], done: Callable[[Ask, Client], None], logs: Path | None = None
) -> Transport:
    """Ask members by calling their half, `client` before and `done` after it; memory does not grow with their
    number, but with that of clients in one pass.

    logs  where the traceback of a client's unforeseen error goes
    """

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        left = list(asks)
        while left:
            task = link.tasks.get(left[0].verb)
            most = task.together[0] if task else 1
            group, left = left[:most], left[most:]
            yield from several(group) if len(group) > 1 else [single(group[0])]

    def single(ask: Ask) -> Reply:
        name, began = str(ask.client), time.monotonic()
        try:
            with panics_as_errors():
                workspace = client(ask)
                name = workspace.name
                reply = respond(link, workspace, ask)
                done(ask, workspace)
        except Exception as error:  # whatever it is, it is about this client
            reply = Reply(ask.client, failure=failure_of(error, name, logs))
        return replace(reply, seconds=time.monotonic() - began)

    def several(asks: Sequence[Ask]) -> Iterator[Reply]:
        began = time.monotonic()
        found = respond_together(link, client, asks)
        for ask, (one, said) in zip(asks, found, strict=True):
            try:
                if isinstance(said, Exception):
                    raise said
                assert one is not None  # or it had said nothing
                done(ask, one)
            except Exception as error:
                name = one.name if one else str(ask.client)
                said = Reply(ask.client, failure=failure_of(error, name, logs))
            yield replace(said, seconds=(time.monotonic() - began) / len(asks))

    return carry
