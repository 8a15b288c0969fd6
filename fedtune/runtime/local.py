"""The local transport: every client in this process, on one shared model; one after the other, or several in
one pass where the recipe says so.

While a client trains, the answer of the one before goes through its chain and is encoded by a thread of its
own: that needs neither the model nor a GPU. Answers come in the order in which they were asked for, with the
bytes that they would have one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.panics import panics_as_errors
from fedtune.runtime.client_half import answered, opened, respond_together
from fedtune.runtime.failures import failure_of
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.types import Client


@dataclass
class Begun:
    """A client that has done its work, and its answer on its way; or what went wrong.

    seconds  until the work was done
    """

    ask: Ask
    name: str
    seconds: float
    client: Client | None = None
    answer: Future[tuple[Reply, float]] | None = None
    error: Exception | None = None


def local_transport(
    link: Link, client: Callable[[Ask], Client], done: Callable[[Ask, Client], None], logs: Path | None = None
) -> Transport:
    """Ask members by calling their half, `client` before and `done` after it; memory does not grow with their
    number, but with that of clients in one pass.

    logs  where the traceback of a client's unforeseen error goes
    """

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        left, before = list(asks), list[Begun]()
        with ThreadPoolExecutor(1, "answers") as writer:
            while left:
                task = link.tasks.get(left[0].verb)
                most = task.together[0] if task else 1
                group, left = left[:most], left[most:]
                if len(group) > 1:
                    yield from map(ended, before)
                    before = []
                    yield from several(group)
                    continue
                now = begin(group[0], writer)
                yield from map(ended, before)
                before = [now] if now.answer else []
                if now.error:
                    yield ended(now)
            yield from map(ended, before)

    def begin(ask: Ask, writer: ThreadPoolExecutor) -> Begun:
        name, began = str(ask.client), time.monotonic()
        try:
            with panics_as_errors():
                one = client(ask)
                name = one.name
                question = opened(link, one, ask)
                update = question[0].work(one, question[2], ask.now)
        except Exception as error:  # whatever it is, it is about this client
            return Begun(ask, name, time.monotonic() - began, error=error)

        def write() -> tuple[Reply, float]:
            since = time.monotonic()
            with panics_as_errors():
                reply = answered(link, one, ask, question, update)
            return reply, time.monotonic() - since

        return Begun(ask, name, time.monotonic() - began, one, writer.submit(write))

    def ended(begun: Begun) -> Reply:
        seconds = begun.seconds
        try:
            if begun.error:
                raise begun.error
            assert begun.client is not None and begun.answer is not None
            reply, more = begun.answer.result()
            done(begun.ask, begun.client)
            seconds += more
        except Exception as error:
            reply = Reply(begun.ask.client, failure=failure_of(error, begun.name, logs))
        return replace(reply, seconds=seconds)

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
