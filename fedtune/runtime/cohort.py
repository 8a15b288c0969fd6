"""A round's clients, wherever they are: both halves of every question, and the running sum.

Both halves speak the wire format even inside one process, so that what is measured, refused and computed is the same
whether a client is a function call away or a continent. How a question reaches a client is the carrier's business:
runtime/local.py calls it, runtime/flower.py sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.events import ClientDone, ClientLeftOut, Event
from fedtune.runtime.journal import Answer
from fedtune.schema import Schema
from fedtune.transforms.base import Chain
from fedtune.types import Client, Method, Round, Tensors, Update
from fedtune.wire import EVERYONE, Expect, Header, decode, decode_state, encode, encode_state


@dataclass(frozen=True)
class Ask:
    """A question to one member: a verb and an encoded state."""

    client: int
    verb: str
    now: Round
    payload: bytes


@dataclass(frozen=True)
class Reply:
    """A member's answer as it came over the wire, or why there is none."""

    client: int
    payload: bytes = b""
    failure: FedtuneError | None = None


Carrier = Callable[[Sequence[Ask]], Iterable[Reply]]  # every ask gets exactly one reply, in any order


@dataclass(frozen=True)
class Link:
    """What both ends of a conversation agree on before the first message."""

    run: str  # the run's identity
    base: str  # fingerprint of the base model
    method: Method
    chain: Chain

    def steps(self, verb: str) -> Chain:
        """The chain for a verb: where single answers are read, steps that only a sum can undo are left out."""
        alone = verb in self.method.reads_each
        return Chain([s for s in self.chain.steps if s.undone == "reply"]) if alone else self.chain

    def near(self, verb: str, given: Tensors) -> Tensors | None:
        return given if verb in self.method.moves else None

    def header(self, verb: str, client: int, now: Round, schema: Schema) -> Header:
        return Header(run=self.run, base=self.base, round=now.number, client=client, verb=verb, schema=schema.fingerprint)

    def expect(self, verb: str, client: int, now: Round, schema: Schema, kinds: frozenset[str]) -> Expect:
        return Expect(run=self.run, base=self.base, round=now.number, client=client, verb=verb, schema=schema, kinds=kinds)


def respond(link: Link, client: Client, ask: Ask) -> bytes:
    """The client's half of one question: decode, do, send through the chain, encode. Raises ClientFailed, Refused."""
    schema = link.method.given(ask.verb, client.model)
    _, given = decode_state(ask.payload, link.expect(ask.verb, EVERYONE, ask.now, schema, STATE))
    update = link.method.verbs[ask.verb](client, given, ask.now)
    require_finite(update, client.name)
    sent = link.steps(ask.verb).send(update, client, ask.now, link.near(ask.verb, given))
    return encode(sent, link.header(ask.verb, client.id, ask.now, link.method.answer(ask.verb, schema)))


STATE = frozenset({"state"})


@dataclass
class RoundCohort:
    """The server's half: asks all members of one round, leaves out what fails, adds up the rest in ascending id."""

    link: Link
    now: Round
    carrier: Carrier
    tell: Callable[[Event], None]
    names: Mapping[int, str]
    answers: dict[int, Answer] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # sums over the answers that count

    def sum(self, verb: str, given: Tensors) -> Update:
        """Raises R405 where nobody gave a usable answer."""
        total: Update | None = None
        for _, update in self._replies(verb, given):
            total = update if total is None else total + update
        if total is None:
            reasons = "; ".join(sorted({a.note for a in self.answers.values()}))[:300]
            raise FedtuneError(
                "R405",
                f"no usable answer from {len(self.now.members)} clients in round {self.now.number} ({reasons})",
                "at least one",
                "look at the clients' errors, then: fedtune resume",
            )
        return self.link.steps(verb).settle(total, self.now, self.link.near(verb, given))

    def each(self, verb: str, given: Tensors) -> Iterator[tuple[int, Update]]:
        """Single answers, ascending; a method that reads them must say so, because the exposure table does."""
        if verb not in self.link.method.reads_each:
            raise RuntimeError(f"{self.link.method.type} reads single answers to '{verb}' without declaring it in reads_each")
        near = self.link.near(verb, given)
        for client, update in self._replies(verb, given):
            yield client, self.link.steps(verb).settle(update, self.now, near)

    def _replies(self, verb: str, given: Tensors) -> Iterator[tuple[int, Update]]:
        schema = Schema.of(given)
        payload = encode_state(given, self.link.header(verb, EVERYONE, self.now, schema))
        asks = [Ask(client, verb, self.now, payload) for client in self.now.members]
        answer = self.link.method.answer(verb, schema)
        for reply in ascending(self.carrier(asks), self.now.members):
            try:
                if reply.failure:
                    raise reply.failure
                _, sent = decode(reply.payload, self.link.expect(verb, reply.client, self.now, answer, self.link.steps(verb).kinds))
                update = self.link.steps(verb).receive(sent, reply.client, self.now)
                require_finite(update, self.names[reply.client])
            except (ClientFailed, Refused) as error:
                self._note(reply.client, Answer(reply.client, error.code, 0.0, len(reply.payload), len(payload), str(error)))
                self.tell(ClientLeftOut(self.now.number, reply.client, self.names[reply.client], error.code, str(error)))
                continue
            for name, number in update.metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + number
            self._note(reply.client, Answer(reply.client, "ok", update.weight, len(reply.payload), len(payload)))
            metrics = {name: number / update.weight for name, number in update.metrics.items()}
            self.tell(ClientDone(self.now.number, reply.client, self.names[reply.client], update.weight, len(reply.payload), len(payload), metrics))
            yield reply.client, update

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
