"""The way down: what clients are given as bytes, whole, as changes to what they hold, or one payload for
each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedtune.runtime.protocol import Given, Link
from fedtune.schema import Schema
from fedtune.transforms.downlink import HeldState
from fedtune.transforms.exact import changed_since, not_zero, recorded
from fedtune.types import Round, Tensors
from fedtune.wire import EVERYONE, encode, encode_changes, encode_state, is_whole


@dataclass(frozen=True)
class Payloads:
    """A broadcast as bytes: whole, as a change for the clients in `current`, or one for each client; what
    builds on what a client holds is for `current`."""

    whole: bytes = b""
    change: bytes = b""
    current: frozenset[int] = frozenset()
    own: Mapping[int, bytes] = field(default_factory=dict)

    def of(self, client: int) -> bytes:
        return self.own.get(client) or (self.change if client in self.current else self.whole)


@dataclass
class Downlink:
    """What the server knows of what clients hold. Committed with the round, because the next broadcast builds
    on it."""

    held: HeldState | None = None
    last: dict[int, int] = field(default_factory=dict)  # client -> the last round in which its answer counted

    def encode(self, link: Link, verb: str, given: Given, now: Round) -> Payloads:
        """This question's payload: one for all, one for each, or a shorter one for clients that hold the
        broadcast before."""
        if callable(given):
            return Payloads(own=self._one_each(link, verb, given, now))
        schema = Schema.of(given)
        if not link.coded(verb):
            return self._exact(link, verb, given, now)
        sent = link.downlink.pack(given, self.held, now.number)
        full = encode(sent.full, link.header(verb, EVERYONE, now, schema))
        if link.downlink.remembers:
            self.held = sent.held
        if sent.delta is None:
            return Payloads(full)
        current = frozenset(client for client, number in self.last.items() if number == sent.since)
        return Payloads(
            full, encode(sent.delta, link.header(verb, EVERYONE, now, schema, sent.since)), current
        )

    def _exact(self, link: Link, verb: str, given: Tensors, now: Round) -> Payloads:
        """The state as it is or, if that is shorter, as the whole numbers that are not 0 or that a client
        does not hold yet."""
        header = link.header(verb, EVERYONE, now, Schema.of(given))
        whole = encode_state(given, header)
        if not is_whole(given):
            return Payloads(whole)
        whole = min(whole, encode_changes(given, not_zero(given), header), key=len)
        if not link.tasks[verb].holds:
            return Payloads(whole)
        self.held = record = recorded(self.held, given, now.number)
        last = {client: self.last[client] for client in now.members if self.last.get(client)}
        since = {
            number: encode_changes(given, changed_since(record, number), replace(header, since=number))
            for number in set(last.values())
        }
        own = {client: since[number] for client, number in last.items() if len(since[number]) < len(whole)}
        return Payloads(whole, current=frozenset(own), own=own)

    def _one_each(
        self, link: Link, verb: str, given: Callable[[int], Tensors], now: Round
    ) -> dict[int, bytes]:
        """A payload by client; members that are given the same tensors share its bytes. Such states travel
        whole."""
        if link.coded(verb):
            raise RuntimeError(
                f"{link.method.facts.type} gives members different tensors, which [downlink] cannot code"
            )
        made: list[tuple[Tensors, bytes]] = []
        own: dict[int, bytes] = {}
        for client in now.members:
            tensors = given(client)
            payload = next((payload for seen, payload in made if seen is tensors), b"")
            if not payload:
                payload = encode_state(tensors, link.header(verb, EVERYONE, now, Schema.of(tensors)))
                made.append((tensors, payload))
            own[client] = payload
        return own
