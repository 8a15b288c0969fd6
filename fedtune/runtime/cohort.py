"""The server's half of a round: asks its clients, wherever they are, and adds up the answers.

Answers are added in ascending id, whatever order they came in. How a question reaches a client is the
transport's business:
runtime/local.py calls it, flower/server_app.py sends it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedtune.errors import ClientFailed, FedtuneError, Paused, Refused
from fedtune.events import Answered, Chose, ClientDone, ClientLeftOut, Event, Noted
from fedtune.privacy.masks import LEAST
from fedtune.runtime.downlink import Downlink, Payloads
from fedtune.runtime.journal import AnswerRecord, StageRecord
from fedtune.runtime.masked import MaskedAsks, masked_sums
from fedtune.runtime.masked_tasks import mask_of
from fedtune.runtime.moves import Moves
from fedtune.runtime.protocol import Ask, Given, Link, Reply, Transport, given_to, require_finite
from fedtune.runtime.replies import ascending, timed
from fedtune.runtime.task import Task
from fedtune.schema import Schema
from fedtune.types import Group, Round, RunningSum, Tensors, Update, summed
from fedtune.wire import decode

EVERYBODY = ""  # the one group of a sum of all


@dataclass
class RoundCohort:
    """The server's half: asks all members of one round, leaves out what fails, adds up the rest in ascending
    id."""

    link: Link
    now: Round
    transport: Transport
    tell: Callable[[Event], None]
    names: Mapping[int, str]
    downlink: Downlink = field(default_factory=Downlink)
    answers: dict[int, AnswerRecord] = field(default_factory=dict)
    figures: list[tuple[int, float, Mapping[str, float]]] = field(
        default_factory=list
    )  # client, weight and metrics of an answer that counts
    sums: list[tuple[float, Mapping[str, float]]] = field(
        default_factory=list
    )  # weight and metrics of sums whose answers have none of their own
    stages: list[StageRecord] = field(default_factory=list)  # who came through which step of masked sums
    notes: dict[str, float] = field(default_factory=dict)  # the server's own figures
    quorum: int = 0  # answers that must count
    waited: float = 0.0  # seconds until answers came, of all questions together
    took: dict[int, float] = field(default_factory=dict)  # client -> seconds of its last answer
    moves: Moves | None = None  # looks at how far single answers move the state

    def sum(self, verb: str, given: Given) -> Update:
        """Raises R405 where nobody gave a usable answer, Paused (R413) where too few came through a masked
        sum."""
        if mask_of(self.link.tasks[verb]):
            everybody = dict.fromkeys(self.now.members, EVERYBODY)
            total = self._under_masks(verb, given, everybody)[EVERYBODY].total
        else:
            total = summed(update for _, update in self._replies(verb, given))
        if total is None:
            raise self._nobody()
        self._require_quorum()
        return self._settled(verb, total, given_to(self.now.members[0], given))

    def each(
        self, verb: str, given: Given, among: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Update]]:
        """Single answers, ascending; a method that reads them must say so, because the exposure table does.
        `among`: the members to ask, all without it. Raises R405 as `sum` does."""
        if not self.link.tasks[verb].reads_each:
            raise RuntimeError(
                f"{self.link.method.facts.type} reads single answers to '{verb}' without declaring it in "
                "reads_each"
            )
        task, some = self.link.tasks[verb], False
        for client, update in self._replies(verb, given, among):
            some = True
            yield client, task.chain.settle(update, self.now, task.near(given_to(client, given)))
        if not some:
            raise self._nobody()
        self._require_quorum()

    def sum_groups(
        self,
        verb: str,
        given: Tensors | Callable[[Group], Tensors],
        group_of: Callable[[int], Group | None],
        min_group: int = 2,
    ) -> dict[Group, Update]:
        """Groups in the order of their first members; who is in none (None) is not asked. Raises R412 where
        one has fewer than `min_group`, R405 where no group is left."""
        task = self.link.tasks[verb]
        if not (task.reads_each or (task.by_group and min_group > 1)):
            raise RuntimeError(
                f"{self.link.method.facts.type} reads sums of {'groups of' if min_group > 1 else 'single'} "
                f"answers to '{verb}' without declaring it in {'by_group' if min_group > 1 else 'reads_each'}"
            )
        masked = bool(mask_of(task))
        min_group = max(min_group, LEAST) if masked else min_group
        group = {client: name for client in self.now.members if (name := group_of(client)) is not None}
        sizes = Counter(group.values())
        if small := [name for name, size in sizes.items() if size < min_group]:
            found = f"{sizes[small[0]]} members of group '{small[0]}' in round {self.now.number}"
            raise FedtuneError(
                "R412",
                found,
                f"at least {min_group} members in a group",
                "make larger groups, or select more clients per round",
            )
        tensors = {name: given(name) if callable(given) else given for name in sizes}
        sums = {name: RunningSum() for name in sizes}
        to_each: Given = (lambda client: tensors[group[client]]) if callable(given) else given
        if masked:
            sums |= self._under_masks(verb, to_each, group, everyone=False)
        else:
            for client, update in self._replies(verb, to_each, list(group)):
                sums[group[client]].add(update)
        settled = dict[Group, Update]()
        for name, running in sums.items():
            if running.total is None or running.count < (1 if masked else min_group):
                self._leave_out(
                    [client for client in group if group[client] == name],
                    running.count,
                    f"group '{name}'",
                    min_group,
                )
            else:
                settled[name] = self._settled(verb, running.total, tensors[name])
        if not settled:
            raise self._nobody()
        self._require_quorum()
        return settled

    def _under_masks(
        self, verb: str, given: Given, group: Mapping[int, Group], everyone: bool = True
    ) -> dict[Group, RunningSum]:
        """Sums of answers that nobody could read, by group; those that failed closed are left out, or raise
        Paused (R413) where `everyone` is one group."""
        asks = MaskedAsks(self._heard, self._replies, self.stages, self.tell, not self.answers)
        task = self.link.tasks[verb]
        sums, short = masked_sums(task, self.link.run, self.now, verb, given, group, asks)
        if short and everyone:
            raise Paused(
                "R413",
                f"{min(short.values())} of {len(group)} members in round {self.now.number} who came through "
                f"the masked sum of '{verb}'",
                "as many as the threshold of the chain's 'mask'",
                "nothing was opened; look at the errors of the others, then: fedtune resume",
            )
        return sums

    def _settled(self, verb: str, total: Update, given: Tensors) -> Update:
        """A sum behind the server's halves of the chain, and the figures that only it has."""
        task = self.link.tasks[verb]
        made = task.chain.settle(total, self.now, task.near(given))
        if task.chain.adds:
            self.sums.append((made.weight, made.metrics))
        return made

    def _leave_out(self, clients: Sequence[int], came: int, whose: str, least: int) -> None:
        """Too few answers of a group: those that came do not count."""
        found = f"{came} usable answers from the {len(clients)} members of {whose} in round {self.now.number}"
        error = FedtuneError("R412", found, f"at least {max(least, 1)}", "look at the errors of the others")
        self._discount(clients, error)
        self.tell(Noted(f"left out: {whose}. {error}"))

    def _require_quorum(self) -> None:
        """Raises Paused (R409)."""
        counted = sum(answer.outcome == "ok" for answer in self.answers.values())
        if counted < self.quorum:
            missing = ", ".join(
                self.names[c]
                for c in self.now.members
                if c not in self.answers or self.answers[c].outcome != "ok"
            )
            found = f"{counted} usable answers in round {self.now.number} (missing: {missing[:200]})"
            raise Paused(
                "R409",
                found,
                f"{self.quorum} (deploy.quorum)",
                "what was accepted is kept; bring the others back, then: fedtune resume",
            )

    def _nobody(self) -> FedtuneError:
        reasons = "; ".join(sorted({a.note for a in self.answers.values()}))[:300]
        found = (
            f"no usable answer from {len(self.now.members)} clients in round {self.now.number} ({reasons})"
        )
        return FedtuneError(
            "R405", found, "at least one", "look at the clients' errors, then: fedtune resume"
        )

    def typical(self, name: str) -> float:
        """Of figures that only the sum has: their mean."""
        if self.sums:
            return self.means.get(name, math.nan)
        said = [metrics[name] / weight for _, weight, metrics in self.figures if name in metrics and weight]
        return statistics.median_low(said) if said else math.nan

    def note(self, name: str, value: float) -> None:
        self.notes[name] = float(value)

    def skip(self, error: FedtuneError) -> None:
        """Answers that came do not count, so that no client takes for received what changed nothing (error
        feedback)."""
        self._discount(self.now.members, error)
        self.note("skipped", 1.0)
        self.tell(Noted(f"round {self.now.number} changes nothing: {error}"))

    @property
    def metrics(self) -> dict[str, float]:
        """Sums over the answers that count."""
        sums: dict[str, float] = {}
        for _, _, metrics in self.figures:
            for name, number in metrics.items():
                sums[name] = sums.get(name, 0.0) + number
        return sums

    @property
    def means(self) -> dict[str, float]:
        """The round's figures, each over the weight of those who said it."""
        if not self.sums:
            weights = {
                name: sum(weight for _, weight, metrics in self.figures if name in metrics)
                for name in self.metrics
            }
            return {name: value / weights[name] for name, value in self.metrics.items() if weights[name]}
        names = {name for _, metrics in self.sums for name in metrics}
        told = {name: [(m[name], weight) for weight, m in self.sums if name in m] for name in names}
        return {name: sum(v for v, _ in pairs) / sum(w for _, w in pairs) for name, pairs in told.items()}

    def _discount(self, clients: Sequence[int], error: FedtuneError) -> None:
        """Answers that came and do not count, because of `error`."""
        counted = {
            client: answer
            for client, answer in self.answers.items()
            if client in clients and answer.outcome == "ok"
        }
        self.answers |= {
            client: replace(answer, outcome=error.code, weight=0.0, note=str(error))
            for client, answer in counted.items()
        }
        self.figures = [one for one in self.figures if one[0] not in clients]

    def _replies(
        self, verb: str, given: Given, among: Sequence[int] | None = None, first: bool | None = None
    ) -> Iterator[tuple[int, Update]]:
        """Answers that count, as far as they may move the state."""
        answers, task = self._counted(verb, given, among, first), self.link.tasks[verb]
        if self.moves is None or not task.moves or mask_of(task):
            return answers
        return self.moves.of(
            verb, answers, lambda client: None if task.chain.relative else given_to(client, given), self.note
        )

    def _counted(
        self, verb: str, given: Given, among: Sequence[int] | None, first: bool | None
    ) -> Iterator[tuple[int, Update]]:
        """Answers that count, told and noted."""
        for client, update, record, said in self._usable(verb, given, among, first):
            if said:
                self.tell(Chose(self.now.number, client, self.names[client], said))
            self.figures.append((client, update.weight, update.metrics))
            self._note(client, record)
            metrics = {name: number / update.weight for name, number in update.metrics.items()}
            rest = (record.up_bytes, record.down_bytes, metrics, self.took.get(client, 0.0))
            self.tell(ClientDone(self.now.number, client, self.names[client], update.weight, *rest))
            yield client, update

    def _heard(
        self, verb: str, given: Given, among: Sequence[int], first: bool, counted: bool = False
    ) -> Iterator[tuple[int, Update]]:
        """Answers to a question beside the round's own, which count for nothing: their bytes are noted.
        `counted`: the members' own answers count already, whatever becomes of this one."""
        for client, update, record, _ in self._usable(verb, given, among, first, counted):
            self._note(
                client, self.answers[client].with_bytes(record) if counted else replace(record, weight=0.0)
            )
            yield client, update

    def _usable(
        self,
        verb: str,
        given: Given,
        among: Sequence[int] | None,
        first: bool | None,
        counted: bool = False,
    ) -> Iterator[tuple[int, Update, AnswerRecord, str]]:
        """Answers that are as asked, with their record and what the client's chain chose; others are told and
        noted."""
        task = self.link.tasks[verb]
        members = self.now.members if among is None else tuple(sorted(among))
        payloads = self.downlink.encode(self.link, verb, given, replace(self.now, members=members))
        last, begins = self.downlink.last, not self.answers if first is None else first
        asks = {
            client: Ask(client, verb, self.now, payloads.of(client), last.get(client, 0), begins)
            for client in members
        }
        down_bytes = {client: len(ask.payload) for client, ask in asks.items()}
        alike = None if callable(given) else self._asked_for(task, given)
        for reply in ascending(self._asked(asks, payloads, down_bytes), members):
            client, down = reply.client, down_bytes[reply.client]
            try:
                here = given_to(client, given)
                update = self._read(task, verb, reply, here, *(alike or self._asked_for(task, here)))
            except (ClientFailed, Refused) as error:
                failed = AnswerRecord(client, error.code, 0.0, len(reply.payload), down, str(error))
                self._note(client, self.answers[client].with_bytes(failed) if counted else failed)
                self.tell(ClientLeftOut(self.now.number, client, self.names[client], error.code, str(error)))
                continue
            yield (
                client,
                update,
                AnswerRecord(client, "ok", update.weight, len(reply.payload), down),
                reply.said,
            )

    def _asked_for(self, task: Task, given: Tensors) -> tuple[Schema, frozenset[str]]:
        """The schema of an answer on its way, and what numbers it may hold."""
        asked = Schema.of(given)
        return task.sent(asked, self.now), task.kinds(task.answer(asked, self.now))

    def _read(
        self, task: Task, verb: str, reply: Reply, given: Tensors, sent: Schema, kinds: frozenset[str]
    ) -> Update:
        """A reply behind every check and the steps that are undone on it. Raises ClientFailed, Refused."""
        if reply.failure:
            raise reply.failure
        client, name, bounds = reply.client, self.names[reply.client], self.link.bounds
        _, said = decode(reply.payload, self.link.expect(verb, client, self.now, sent, kinds))
        update = task.chain.receive(said, client, self.now)
        require_finite(update, name)
        bounds.check(
            self.now.number, client, name, verb, update, given, self.link.limits.spread, task.row_noise
        )
        return update

    def _asked(
        self, asks: Mapping[int, Ask], payloads: Payloads, down_bytes: dict[int, int]
    ) -> Iterator[Reply]:
        """One reply for each ask. A client that has lost the broadcast that its change builds on is asked
        again, with the whole."""
        again: list[Ask] = []
        for reply in self._once(self.transport(list(asks.values())), asks):
            if reply.failure and reply.failure.code == "W604" and reply.client in payloads.current:
                again.append(replace(asks[reply.client], payload=payloads.whole, last=0))
                down_bytes[reply.client] += len(payloads.whole)
            else:
                yield reply
        if again:
            yield from self._once(self.transport(again), {ask.client: ask for ask in again})

    def _once(self, replies: Iterable[Reply], asks: Mapping[int, Ask]) -> Iterator[Reply]:
        """The first reply of each client that was asked; a second one is told and dropped, a missing one is a
        failure."""
        open_asks, began = set(asks), time.monotonic()
        for reply in timed(replies, self._wait):
            name = self.names.get(reply.client, str(reply.client))
            if reply.client in open_asks:
                open_asks.remove(reply.client)
                self.took[reply.client] = reply.seconds or time.monotonic() - began
                if not reply.seconds:  # it comes from elsewhere, beside others
                    self.tell(Answered(self.now.number, reply.client, name, self.took[reply.client]))
                yield reply
            else:
                text = (
                    "W605: found a second answer to one question, expected one; the first counts, this one "
                    "is dropped."
                )
                self.tell(ClientLeftOut(self.now.number, reply.client, name, "W605", text))
        for client in sorted(open_asks):
            yield Reply(
                client,
                failure=ClientFailed(
                    "F503",
                    sentence="the transport returned no reply for this client",
                    do="look at the node's log",
                ),
            )

    def _wait(self, seconds: float) -> None:
        self.waited += seconds

    def _note(self, client: int, answer: AnswerRecord) -> None:
        """One row a member and round: bytes of all its verbs add up."""
        before = self.answers.get(client)
        up, down = (before.up_bytes, before.down_bytes) if before else (0, 0)
        self.answers[client] = AnswerRecord(
            client, answer.outcome, answer.weight, up + answer.up_bytes, down + answer.down_bytes, answer.note
        )
