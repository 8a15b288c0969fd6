"""A round's clients, wherever they are: both halves of every question, and the running sum.

Both halves speak the wire format even inside one process, so that what is measured, refused and computed is the same
whether a client is a function call away or a continent. How a question reaches a client is the carrier's business:
runtime/local.py calls it, runtime/flower.py sends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedtune.errors import ClientFailed, FedtuneError, Paused, Refused
from fedtune.events import Chose, ClientDone, ClientLeftOut, Event, Noted
from fedtune.runtime.journal import Answer
from fedtune.runtime.scoring import NOTHING, SCORE, scored
from fedtune.schema import Schema
from fedtune.transforms.base import Chain
from fedtune.transforms.broadcast import DownlinkSettings, Held, hold, holding, pack, unpack
from fedtune.transforms.exact import changed_since, not_zero, recorded
from fedtune.types import Client, Method, Round, Tensors, Update, Verb, summed
from fedtune.wire import EVERYONE, Expect, Header, decode, decode_state, encode, encode_changes, encode_state, is_whole
from fedtune.wire.settings import LimitSettings


@dataclass(frozen=True)
class Ask:
    """A question to one member: a verb and an encoded state."""

    client: int
    verb: str
    now: Round
    payload: bytes
    last: int = 0  # the last round in which an answer of this client counted; 0: none yet
    first: bool = True  # the first question of its round


Versions = dict[int, dict[str, np.ndarray]]  # round -> what a client's memory was after it


def memory_before(versions: Versions, ask: Ask) -> dict[str, np.ndarray]:
    """The memory to answer with: that of the last answer that counted. What a lost answer wrote is forgotten, so that
    error feedback never takes for sent what the server did not get."""
    return dict(versions.get(ask.last if ask.first else ask.now.number, {}))


def memory_after(versions: Versions, ask: Ask, memory: dict[str, np.ndarray]) -> Versions:
    """The two memories worth keeping: before this round, and after this answer if it will count."""
    kept = {ask.last: versions.get(ask.last, {}), ask.now.number: memory}
    return {number: tensors for number, tensors in kept.items() if tensors}


@dataclass(frozen=True)
class Reply:
    """A member's answer as it came over the wire, or why there is none."""

    client: int
    payload: bytes = b""
    failure: FedtuneError | None = None
    said: str = ""  # what the client's chain chose, and why


Carrier = Callable[[Sequence[Ask]], Iterable[Reply]]  # every ask gets exactly one reply, in any order
Given = Tensors | Callable[[int], Tensors]  # the same for all members, or by client


def given_to(client: int, given: Given) -> Tensors:
    return given(client) if callable(given) else given


@dataclass(frozen=True)
class Link:
    """What both ends of a conversation agree on before the first message."""

    run: str  # the run's identity
    base: str  # fingerprint of the base model
    method: Method
    chain: Chain
    downlink: DownlinkSettings = field(default_factory=DownlinkSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    score_batch: int = 32

    def steps(self, verb: str) -> Chain:
        """The chain for a verb: where single answers are read, steps that only a sum can undo are left out."""
        if verb == SCORE:
            return Chain([])
        alone = verb in self.method.reads_each
        return Chain([s for s in self.chain.steps if s.undone == "reply"]) if alone else self.chain

    def kinds(self, verb: str, answer: Schema) -> frozenset[str]:
        """What numbers an answer may hold: as the method declares whole numbers, as the chain leaves them otherwise."""
        return frozenset({"whole"}) if answer.whole and not self.steps(verb).steps else self.steps(verb).kinds

    def work(self, verb: str) -> Verb:
        """A client's half of a verb: the method's, or the runtime's own."""
        return scored(self.method, self.score_batch) if verb == SCORE else self.method.verbs[verb]

    def given(self, verb: str, bench: Any, client: int, now: Round) -> Schema:
        """What a client is given; to score, it is what it is given to train."""
        return self.method.given("train" if verb == SCORE else verb, bench, client, now)

    def answer(self, verb: str, given: Schema, now: Round) -> Schema:
        return NOTHING if verb == SCORE else self.method.answer(verb, given, now)

    def near(self, verb: str, given: Tensors) -> Tensors | None:
        return given if verb in self.method.moves else None

    def coded(self, verb: str) -> bool:
        """Whether what is given with a verb travels through the downlink's code: only what the verb moves can be lossy."""
        return self.downlink.step != "none" and verb in self.method.moves

    def holds(self, verb: str) -> bool:
        """Whether clients keep the whole numbers that they are given with a verb, so that later only changes need travel."""
        return verb in getattr(self.method, "holds", ())

    def header(self, verb: str, client: int, now: Round, schema: Schema, since: int = 0) -> Header:
        return Header(run=self.run, base=self.base, round=now.number, client=client, verb=verb, schema=schema.fingerprint, since=since, whole=schema.whole)

    def expect(self, verb: str, client: int, now: Round, schema: Schema, kinds: frozenset[str]) -> Expect:
        plain = Expect(run=self.run, base=self.base, round=now.number, client=client, verb=verb, schema=schema, kinds=kinds)
        if client == EVERYONE:  # the limits are the server's, for answers
            return plain
        return replace(plain, max_weight=self.limits.weight, max_norm=self.limits.norm or math.inf)


def respond(link: Link, client: Client, ask: Ask) -> bytes:
    """The client's half of one question: decode, do, send through the chain, encode. Raises ClientFailed, Refused."""
    schema = link.given(ask.verb, client.model, client.id, ask.now)
    given = received(link, client, ask, schema)
    if ask.verb != SCORE and not len(client.data):
        found, expected = f"no training examples at client '{client.name}'", "at least one: a text whose whole response is cut at data.max_length is none"
        raise ClientFailed("D205", found, expected, "give it rows, or raise data.max_length")
    update = link.work(ask.verb)(client, given, ask.now)
    require_finite(update, client.name)
    sent = link.steps(ask.verb).send(update, client, ask.now, link.near(ask.verb, given))
    return encode(sent, link.header(ask.verb, client.id, ask.now, link.answer(ask.verb, schema, ask.now)))


def received(link: Link, client: Client, ask: Ask, schema: Schema) -> Tensors:
    """What the server gives, as this client now holds it. Raises Refused."""
    if not link.coded(ask.verb):
        known = holding(client.memory) if link.holds(ask.verb) else None
        expect = link.expect(ask.verb, EVERYONE, ask.now, schema, frozenset({"state", "changes"}))
        _, tensors = decode_state(ask.payload, expect, (known.round, known.tensors) if known else (0, {}))
        if link.holds(ask.verb):
            hold(client.memory, Held(ask.now.number, tensors))
        return tensors
    header, message = decode(ask.payload, link.expect(ask.verb, EVERYONE, ask.now, schema, frozenset({"values", "levels"})))
    before = holding(client.memory) if header.since else None
    if header.since != (before.round if before else 0):
        raise Refused("W604", f"a change to the broadcast of round {header.since}", "one that this client holds", "the server sends the whole state next time")
    given = unpack(link.downlink, message, before.tensors if before else None)
    if link.downlink.step == "delta":
        hold(client.memory, Held(ask.now.number, given))
    return given


@dataclass
class Downlink:
    """What the server knows of what clients hold. Committed with the round, because the next broadcast builds on it."""

    held: Held | None = None
    last: dict[int, int] = field(default_factory=dict)  # client -> the last round in which its answer counted

    def encode(self, link: Link, verb: str, given: Given, now: Round) -> Payloads:
        """This question's payload: one for all, one for each, or a shorter one for clients that hold the broadcast before."""
        if callable(given):
            return Payloads(own=self._one_each(link, verb, given, now))
        schema = Schema.of(given)
        if not link.coded(verb):
            return self._exact(link, verb, given, now)
        sent = pack(link.downlink, given, self.held, now.number)
        full = encode(sent.full, link.header(verb, EVERYONE, now, schema))
        if link.downlink.step == "delta":
            self.held = sent.held
        if sent.delta is None:
            return Payloads(full)
        current = frozenset(client for client, number in self.last.items() if number == sent.since)
        return Payloads(full, encode(sent.delta, link.header(verb, EVERYONE, now, schema, sent.since)), current)

    def _exact(self, link: Link, verb: str, given: Tensors, now: Round) -> Payloads:
        """The state as it is or, if that is shorter, as the whole numbers that are not 0 or that a client does not hold yet."""
        header = link.header(verb, EVERYONE, now, Schema.of(given))
        whole = encode_state(given, header)
        if not is_whole(given):
            return Payloads(whole)
        whole = min(whole, encode_changes(given, not_zero(given), header), key=len)
        if not link.holds(verb):
            return Payloads(whole)
        self.held = record = recorded(self.held, given, now.number)
        last = {client: self.last[client] for client in now.members if self.last.get(client)}
        since = {number: encode_changes(given, changed_since(record, number), replace(header, since=number)) for number in set(last.values())}
        own = {client: since[number] for client, number in last.items() if len(since[number]) < len(whole)}
        return Payloads(whole, current=frozenset(own), own=own)

    def _one_each(self, link: Link, verb: str, given: Callable[[int], Tensors], now: Round) -> dict[int, bytes]:
        """A payload by client; members that are given the same tensors share its bytes. Such states travel whole."""
        if link.coded(verb):
            raise RuntimeError(f"{link.method.type} gives members different tensors, which [downlink] cannot code")
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


@dataclass(frozen=True)
class Payloads:
    """A broadcast as bytes: whole, as a change for the clients in `current`, or one for each client; what builds on what a client holds is for `current`."""

    whole: bytes = b""
    change: bytes = b""
    current: frozenset[int] = frozenset()
    own: Mapping[int, bytes] = field(default_factory=dict)

    def of(self, client: int) -> bytes:
        return self.own.get(client) or (self.change if client in self.current else self.whole)


@dataclass
class RoundCohort:
    """The server's half: asks all members of one round, leaves out what fails, adds up the rest in ascending id."""

    link: Link
    now: Round
    carrier: Carrier
    tell: Callable[[Event], None]
    names: Mapping[int, str]
    downlink: Downlink = field(default_factory=Downlink)
    answers: dict[int, Answer] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # sums over the answers that count
    notes: dict[str, float] = field(default_factory=dict)  # the server's own figures
    quorum: int = 0  # answers that must count

    def sum(self, verb: str, given: Tensors) -> Update:
        """Raises R405 where nobody gave a usable answer."""
        total = summed(update for _, update in self._replies(verb, given))
        if total is None:
            raise self._nobody()
        self._require_quorum()
        return self.link.steps(verb).settle(total, self.now, self.link.near(verb, given))

    def each(self, verb: str, given: Given) -> Iterator[tuple[int, Update]]:
        """Single answers, ascending; a method that reads them must say so, because the exposure table does. Raises R405 as `sum` does."""
        if verb not in self.link.method.reads_each:
            raise RuntimeError(f"{self.link.method.type} reads single answers to '{verb}' without declaring it in reads_each")
        some = False
        for client, update in self._replies(verb, given):
            some = True
            yield client, self.link.steps(verb).settle(update, self.now, self.link.near(verb, given_to(client, given)))
        if not some:
            raise self._nobody()
        self._require_quorum()

    def _require_quorum(self) -> None:
        """Raises Paused (R409)."""
        counted = sum(answer.outcome == "ok" for answer in self.answers.values())
        if counted < self.quorum:
            missing = ", ".join(self.names[c] for c in self.now.members if c not in self.answers or self.answers[c].outcome != "ok")
            found = f"{counted} usable answers in round {self.now.number}; missing: {missing[:200]}"
            raise Paused("R409", found, f"{self.quorum} (deploy.quorum)", "what was accepted is kept; bring the others back, then: fedtune resume")

    def _nobody(self) -> FedtuneError:
        reasons = "; ".join(sorted({a.note for a in self.answers.values()}))[:300]
        found = f"no usable answer from {len(self.now.members)} clients in round {self.now.number} ({reasons})"
        return FedtuneError("R405", found, "at least one", "look at the clients' errors, then: fedtune resume")

    def note(self, name: str, value: float) -> None:
        self.notes[name] = float(value)

    def skip(self, error: FedtuneError) -> None:
        """Answers that came do not count, so that no client takes for received what changed nothing (error feedback)."""
        counted = {client: answer for client, answer in self.answers.items() if answer.outcome == "ok"}
        self.answers |= {client: replace(answer, outcome=error.code, weight=0.0, note=str(error)) for client, answer in counted.items()}
        self.metrics.clear()
        self.note("skipped", 1.0)
        self.tell(Noted(f"round {self.now.number} changes nothing: {error}"))

    def _replies(self, verb: str, given: Given) -> Iterator[tuple[int, Update]]:
        payloads = self.downlink.encode(self.link, verb, given, self.now)
        last, first = self.downlink.last, not self.answers
        asks = {client: Ask(client, verb, self.now, payloads.of(client), last.get(client, 0), first) for client in self.now.members}
        down_bytes = {client: len(ask.payload) for client, ask in asks.items()}
        alike = None if callable(given) else self.link.answer(verb, Schema.of(given), self.now)
        for reply in ascending(self._asked(asks, payloads, down_bytes), self.now.members):
            down = down_bytes[reply.client]
            try:
                if reply.failure:
                    raise reply.failure
                answer = alike or self.link.answer(verb, Schema.of(given_to(reply.client, given)), self.now)
                _, sent = decode(reply.payload, self.link.expect(verb, reply.client, self.now, answer, self.link.kinds(verb, answer)))
                update = self.link.steps(verb).receive(sent, reply.client, self.now)
                require_finite(update, self.names[reply.client])
            except (ClientFailed, Refused) as error:
                self._note(reply.client, Answer(reply.client, error.code, 0.0, len(reply.payload), down, str(error)))
                self.tell(ClientLeftOut(self.now.number, reply.client, self.names[reply.client], error.code, str(error)))
                continue
            if reply.said:
                self.tell(Chose(self.now.number, reply.client, self.names[reply.client], reply.said))
            for name, number in update.metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + number
            self._note(reply.client, Answer(reply.client, "ok", update.weight, len(reply.payload), down))
            metrics = {name: number / update.weight for name, number in update.metrics.items()}
            self.tell(ClientDone(self.now.number, reply.client, self.names[reply.client], update.weight, len(reply.payload), down, metrics))
            yield reply.client, update

    def _asked(self, asks: Mapping[int, Ask], payloads: Payloads, down_bytes: dict[int, int]) -> Iterator[Reply]:
        """One reply for each ask. A client that has lost the broadcast that its change builds on is asked again, with the whole."""
        again: list[Ask] = []
        for reply in self._once(self.carrier(list(asks.values())), asks):
            if reply.failure and reply.failure.code == "W604" and reply.client in payloads.current:
                again.append(replace(asks[reply.client], payload=payloads.whole, last=0))
                down_bytes[reply.client] += len(payloads.whole)
            else:
                yield reply
        if again:
            yield from self._once(self.carrier(again), {ask.client: ask for ask in again})

    def _once(self, replies: Iterable[Reply], asks: Mapping[int, Ask]) -> Iterator[Reply]:
        """The first reply of each client that was asked; a second one is told and dropped, a missing one is a failure."""
        open_asks = set(asks)
        for reply in replies:
            if reply.client in open_asks:
                open_asks.remove(reply.client)
                yield reply
            else:
                name = self.names.get(reply.client, str(reply.client))
                text = "W605: found a second answer to one question, expected one; the first counts, this one is dropped."
                self.tell(ClientLeftOut(self.now.number, reply.client, name, "W605", text))
        for client in sorted(open_asks):
            yield Reply(client, failure=ClientFailed("F503", "no reply from the carrier", "one for each question", "look at the node's log"))

    def _note(self, client: int, answer: Answer) -> None:
        """One row a member and round: bytes of all its verbs add up."""
        before = self.answers.get(client)
        up, down = (before.up_bytes, before.down_bytes) if before else (0, 0)
        self.answers[client] = Answer(client, answer.outcome, answer.weight, up + answer.up_bytes, down + answer.down_bytes, answer.note)


def ascending(replies: Iterable[Reply], members: Sequence[int]) -> Iterator[Reply]:
    """Replies by ascending id, whatever order they came in: float sums depend on order, results must not."""
    waiting: dict[int, Reply] = {}
    order = iter(members)
    wanted = next(order, None)
    for reply in replies:
        waiting[reply.client] = reply
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted = next(order, None)


def require_finite(update: Update, name: str) -> None:
    """Raise ClientFailed (W607) where an answer holds NaN or Inf."""
    for tensor, value in update.tensors.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ClientFailed("W607", f"NaN or Inf in '{tensor}' from client '{name}'", "finite numbers", "lower the learning rate or set method.train.clip")
