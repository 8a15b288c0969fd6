"""The client's half of a question, the same wherever the client is, and what the client remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from fedtune.errors import ClientFailed, Refused
from fedtune.panics import panics_as_errors
from fedtune.runtime.protocol import Ask, Link, Reply, require_finite
from fedtune.runtime.task import Task
from fedtune.schema import Schema
from fedtune.transforms.downlink import HeldState, hold, holding
from fedtune.types import Client, Round, Tensors, Update
from fedtune.wire import EVERYONE, decode, decode_state, encode, schema_named

Cover = Callable[[Update, Tensors | None], Update]
Opened = tuple[Task, Schema, Tensors]
Versions = dict[int, dict[str, np.ndarray]]  # round -> a client's state after it


def state_before(versions: Versions, ask: Ask) -> dict[str, np.ndarray]:
    """The client's state to answer with: that of the last answer that counted. What a lost answer wrote is
    forgotten, so that error feedback never takes for sent what the server did not get."""
    return dict(versions.get(ask.last if ask.first else ask.now.number, {}))


def state_after(versions: Versions, ask: Ask, client_state: dict[str, np.ndarray]) -> Versions:
    """The two states of a client worth keeping: before this round, and after this answer if it will count."""
    kept = {ask.last: versions.get(ask.last, {}), ask.now.number: client_state}
    return {number: tensors for number, tensors in kept.items() if tensors}


def respond(link: Link, client: Client, ask: Ask, cover: Cover | None = None) -> Reply:
    """One question: decode, do, send through the chain, encode. Raises ClientFailed, Refused.

    cover  what this client's site does to an answer first, given what the answer is the difference to
    """
    task, schema, given = opened(link, client, ask)
    update = task.work(client, given, ask.now)
    return answered(link, client, ask, (task, schema, given), update, cover)


def respond_together(
    link: Link, client: Callable[[Ask], Client], asks: Sequence[Ask]
) -> list[tuple[Client | None, Reply | Exception]]:
    """The same question to several clients at once, whose work is done in one pass. For each, in their order:
    the client, where there is one, and a reply or what went wrong."""
    clients: dict[int, Client] = {}
    questions: dict[int, Opened] = {}
    said: dict[int, Reply | Exception] = {}
    for place, ask in enumerate(asks):
        try:
            with panics_as_errors():
                clients[place] = client(ask)
                questions[place] = opened(link, clients[place], ask)
        except Exception as error:  # whatever it is, it is about this client
            said[place] = error
    for place, update in done_together(questions, clients, asks[0].now).items():
        try:
            if isinstance(update, Exception):
                raise update
            said[place] = answered(link, clients[place], asks[place], questions[place], update)
        except Exception as error:
            said[place] = error
    return [(clients.get(place), said[place]) for place in range(len(asks))]


def done_together(
    questions: Mapping[int, Opened], clients: Mapping[int, Client], now: Round
) -> dict[int, Update | Exception]:
    """The work of those whose question could be opened, in one pass; what ends that is about all of them."""
    if not questions:
        return {}
    work = next(iter(questions.values()))[0].together[1]
    assert work is not None
    try:
        with panics_as_errors():
            found = work(
                [clients[place] for place in questions], [given for _, _, given in questions.values()], now
            )
        return dict(zip(questions, found, strict=True))
    except Exception as error:
        return dict.fromkeys(questions, error)


def opened(link: Link, client: Client, ask: Ask) -> Opened:
    """A question, its task, and what the client is given with it. Raises ClientFailed, Refused."""
    task = link.tasks.get(ask.verb)
    if task is None:
        raise Refused(
            "W604",
            f"the verb '{ask.verb[:40]}'",
            f"one of {', '.join(sorted(link.tasks))}",
            "install the same version of fedtune on both sides",
        )
    schema = asked_with(task, client.model, ask)
    given = received(link, client, ask, schema)
    if task.trains and not len(client.data):
        found, expected = (
            f"no training examples at client '{client.name}'",
            "at least one: a text whose whole response is cut at data.max_length is none",
        )
        raise ClientFailed("D205", found, expected, "give it rows, or raise data.max_length")
    return task, schema, given


def asked_with(task: Task, tunable: Any, ask: Ask) -> Schema:
    """The schema of what comes with a question: of several, the one that the message names; where it names
    none of them, the first, by which it is then refused. Raises Refused W601, W602, W606."""
    first = task.given(tunable, ask.client, ask.now)
    if task.otherwise is None:
        return first
    named = schema_named(ask.payload)
    others = task.otherwise(tunable, ask.client, ask.now)
    return next((schema for schema in chain([first], others) if schema.fingerprint == named), first)


def answered(
    link: Link, client: Client, ask: Ask, question: Opened, update: Update, cover: Cover | None = None
) -> Reply:
    """What the client found, covered, through the chain, encoded."""
    task, schema, given = question
    require_finite(update, client.name)
    update = cover(update, task.near(given)) if cover else update
    sent = task.chain.send(update, client, ask.now, task.near(given))
    payload = encode(sent, link.header(ask.verb, client.id, ask.now, task.sent(schema, ask.now)))
    return Reply(client.id, payload, said="; ".join(sent.notes))


def received(link: Link, client: Client, ask: Ask, schema: Schema) -> Tensors:
    """What the server gives, as this client now holds it. Raises Refused."""
    if not link.coded(ask.verb):
        holds = link.tasks[ask.verb].holds
        known = holding(client.state) if holds else None
        expect = link.expect(ask.verb, EVERYONE, ask.now, schema, frozenset({"state", "changes"}))
        _, tensors = decode_state(ask.payload, expect, (known.round, known.tensors) if known else (0, {}))
        if holds:
            hold(client.state, HeldState(ask.now.number, tensors))
        return tensors
    header, message = decode(
        ask.payload, link.expect(ask.verb, EVERYONE, ask.now, schema, frozenset({"values", "levels"}))
    )
    before = holding(client.state) if header.since else None
    if header.since != (before.round if before else 0):
        raise Refused(
            "W604",
            f"changes relative to the broadcast of round {header.since}",
            "a broadcast that this client has",
            "the server sends the whole state next time",
        )
    given = link.downlink.unpack(message, before.tensors if before else None)
    if link.downlink.remembers:
        hold(client.state, HeldState(ask.now.number, given))
    return given
