"""A hostile site: it has keys and rows, speaks the protocol to the letter, and lies in what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.deploy.sites import Details
from fedtune.deploy.worker import Worker
from fedtune.runtime.client_half import received
from fedtune.runtime.protocol import Ask, Link
from fedtune.runtime.workspace import Workspace
from fedtune.trust import Ticket
from fedtune.types import Round, Update
from fedtune.wire import encode

Lie = Callable[[Update], Update]


class Liar(Worker):
    """A worker whose answers are what `lie` makes of honest ones, and whose greeting says what `says`
    adds."""

    lie: Lie = staticmethod(lambda update: update)
    says: dict[str, Any] = {}  # noqa: RUF012  # set on each one

    def report(self) -> dict[str, Any]:
        return {**super().report(), **self.says}

    def computed(self, about: Ticket, details: Details, workspace: Workspace, link: Link) -> str:
        ask = Ask(
            details.number,
            about.verb,
            Round(about.round, details.seed, details.members),
            self.exchange.fetch(about),
            details.last,
            details.first,
        )
        client, task = workspace.client_with(ask.client, {}), link.tasks[ask.verb]
        schema = task.given(client.model, client.id, ask.now)
        given = received(link, client, ask, schema)
        update = task.chain.send(
            self.lie(task.work(client, given, ask.now)), client, ask.now, task.near(given)
        )
        header = link.header(ask.verb, client.id, ask.now, task.answer(schema, ask.now))
        self.exchange.send(about, encode(update, header))
        return ""


def times(factor: float, figures: float = 1.0, weight: float = 1.0) -> Lie:
    """Values, figures and weight of an answer, each so many times what they are."""

    def lie(update: Update) -> Update:
        said = update.weight * weight
        values = {name: value / update.weight * factor * said for name, value in update.tensors.items()}
        return Update(
            values,
            said,
            {name: number / update.weight * figures * said for name, number in update.metrics.items()},
            update.scales,
        )

    return lie
