"""A client of a local run whose answers are not what it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedtune.errors import ClientFailed
from fedtune.runtime.client_half import received
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workspace import Workspace
from fedtune.schema import Schema
from fedtune.types import Tensors, Update
from fedtune.wire import Header, encode
from fedtune.wire.message import headed, raw, sealed

Poison = Callable[[Update, Tensors], Update]  # what it should have answered, and what it was given


def poisoned(client: int, poison: Poison) -> Any:
    """A local transport in which one client answers what `poison` makes of its honest answer."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)

        def lied(ask: Ask) -> Reply:
            who, task = workspace.client(ask), link.tasks[ask.verb]
            schema = task.given(who.model, who.id, ask.now)
            given = received(link, who, ask, schema)
            update = poison(task.work(who, given, ask.now), given)
            sent = task.chain.send(update, who, ask.now, task.near(given))
            header = link.header(ask.verb, ask.client, ask.now, task.answer(schema, ask.now))
            return Reply(ask.client, forged(sent, header))

        def asked(asks: Sequence[Ask]) -> Iterator[Reply]:
            yield from real([ask for ask in asks if ask.client != client])
            yield from (lied(ask) for ask in asks if ask.client == client)

        return asked

    return carry


def forged(update: Update, header: Header) -> bytes:
    """A message as it should be, of an answer that an honest encoder would not send."""
    try:
        return encode(update, header)
    except (ClientFailed, ValueError):
        message = headed(header, "values", Schema.of(update.tensors), update.weight)
        with np.errstate(all="ignore"):
            return sealed(message, raw(update.values()))


def sign_flip(times: float) -> Poison:
    """As far in the other direction, so many times."""

    def poison(update: Update, given: Tensors) -> Update:
        move = update.shifted(given, -1)
        back = {name: -times * value for name, value in move.tensors.items()}
        return replace(move, tensors=back).shifted(given, +1)

    return poison


def all_values(value: float) -> Poison:
    """Every number is this one."""
    return lambda update, given: replace(
        update,
        tensors={name: np.full(one.shape, value * update.weight) for name, one in update.tensors.items()},
    )


def weighs(weight: float) -> Poison:
    """The honest answer, under a weight of its own."""
    return lambda update, given: Update.of(update.mean().tensors, weight)
