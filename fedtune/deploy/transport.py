"""Questions and answers of a round over the exchange: Flower takes the tickets, states and updates travel by
themselves.

What the exchange has accepted counts, whatever happened to the Flower message that asked for it: a member
that came back at another
node, a coordinator that was restarted, an answer of Flower's that was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedtune.deploy.sites import Details
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.exchange import ServerStore
from fedtune.forms import MemberName, RunName, Sha256, VerbName
from fedtune.runtime.failures import heard
from fedtune.runtime.protocol import Ask, Link, Reply
from fedtune.trust import Identity, Ticket, ticket
from fedtune.trust.envelope import PROTOCOL

PAUSE = 0.2  # seconds between two looks
AGAIN = 10.0  # seconds before a member that could not work now is asked again
SKEW = 300.0  # seconds that a ticket is good beyond its question's end: clocks differ
# seconds without a word from a member that was sent a ticket, after which it is sent another; twice as long
# each time
SILENT = 60.0
ABSENT, GRACE = (
    2,
    2.0,
    # questions in a row without an answer, after which a member is asked and not waited for; seconds that it
    # gets
    # in any case
)
GONE = ("E803", "E807")  # what the exchange should have is not there, or is damaged
LOST = "W604"  # of a broadcast that a member no longer has: it is asked again with the whole
LATER = ("E", "R404", "S711", "S712", "F505")  # codes, or their letters, of mistakes that may mend themselves


class Members(Protocol):
    """What is asked of Flower's nodes (flower/nodes.py)."""

    at: dict[str, int]
    reports: dict[str, Mapping[str, Any]]

    def look(self) -> None: ...

    def ask(self, name: str, ticket: bytes, seconds: float) -> int: ...

    def over(self) -> None: ...

    def answers(self) -> Iterator[tuple[str, Mapping[str, str] | None]]: ...


@dataclass
class Exchanged:
    """A transport: called with the asks of one question, it gives one reply each.

    run       this run's name on the exchange, no other run's
    sites     the clients' names, by number
    deadline  seconds for one question
    enough    how many answers end it, given how many were asked
    budget    most bytes of one answer
    tells     what the method wants a client of that name to know
    speaks   whether a member of that name has a key that may speak now
    absent   name -> questions in a row without an answer of it
    """

    server_store: ServerStore
    members: Members
    coordinator: Callable[[], Identity]
    link: Link
    run: str
    recipe: str
    sites: Sequence[str]
    deadline: float
    enough: Callable[[int], int]
    budget: Callable[[Sequence[Ask]], int]
    tells: Callable[[Ask, str], dict[str, str]] = lambda ask, name: {}
    speaks: Callable[[str], bool] = lambda name: True
    absent: dict[str, int] = field(default_factory=dict)
    attempts: dict[tuple[int, str, int], int] = field(default_factory=dict)

    def __call__(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        if not asks:
            return
        now, verb = asks[0].now, asks[0].verb
        self.server_store.release(
            self.run, now.number - 1
        )  # a round that is asked about follows one that was committed
        hashes = {ask.client: self.server_store.offer(self.run, ask.payload) for ask in asks}
        budget = self.budget(asks)
        out = self.server_store.left_out(self.run, now.number, verb)
        self.server_store.open_round(
            self.run,
            now.number,
            verb,
            self.link.base,
            {self.sites[number]: hashes[number] for number in hashes if self.sites[number] not in out},
            budget,
        )
        # an update may be here before Flower says that its ticket is done: that word is not about the next
        # one
        self.members.over()
        question = Question(self, {self.sites[ask.client]: ask for ask in asks}, hashes, budget)
        wanted, end = self.enough(len(asks)), time.monotonic() + self.deadline
        yield from question.closed_without(out)
        while (
            question.open
            and question.counted < wanted
            and time.monotonic() < end
            and question.is_waited_for()
        ):
            self.members.look()
            yield from question.failures()
            yield from question.shut_out()
            yield from question.accepted()
            question.ask(end - time.monotonic())
            if question.open and question.counted < wanted:
                time.sleep(PAUSE)
        self.server_store.close_round(
            self.run,
            now.number,
            verb,
            {name: str(failure) for name, failure in question.failed.items()},
            [name for name, failure in question.failed.items() if failure.code == LOST],
        )
        # what came in between the last look and the close was given a receipt, so it counts
        yield from question.accepted()
        yield from question.missing(wanted)

    def came(self, name: str, answered: bool) -> None:
        """Count the questions in a row that a member has not answered."""
        self.absent[name] = 0 if answered else self.absent.get(name, 0) + 1


@dataclass
class Question:
    """One verb of one round, as it stands."""

    transport: Exchanged
    open: dict[str, Ask]
    hashes: Mapping[int, Sha256]
    budget: int
    counted: int = 0
    said: dict[str, str] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # name -> the node that holds its ticket
    turns: dict[str, int] = field(default_factory=dict)  # name -> tickets it was sent
    silent: dict[str, float] = field(
        default_factory=dict
    )  # name -> not a second time to the same node before this time
    pause: dict[str, float] = field(default_factory=dict)  # name -> not before this time
    words: dict[str, str] = field(
        default_factory=dict
    )  # name -> why it could not work when it was last asked
    began: float = field(default_factory=time.monotonic)
    failed: dict[str, FedtuneError] = field(default_factory=dict)  # who is left out, and why
    alone: float = 0.0  # since when nobody is left but members that have been absent

    def is_waited_for(self) -> bool:
        """Whether there is somebody to wait for. A member that gave no answer to the last questions is asked
        like everybody, and gets once more as long as
        the others took if it is here; so it comes back by itself, and one that does not holds up nobody."""
        absent = self.transport.absent
        if not self.counted or any(absent.get(name, 0) < ABSENT for name in self.open):
            self.alone = 0.0
            return True
        self.alone = self.alone or time.monotonic()
        here = any(name in self.transport.members.at for name in self.open)
        return here and time.monotonic() < self.alone + (self.alone - self.began) + GRACE

    def shut_out(self) -> Iterator[Reply]:
        """Members whose keys were all revoked, or have ended, while the question is open: they can answer
        nothing any more."""
        for name in [name for name in self.open if not self.transport.speaks(name)]:
            yield self._failed(
                name,
                ClientFailed(
                    "T706",
                    sentence=f"'{name}' has no valid key",
                    do=f"run: fedtune keys renew {name}, or start a new run without it",
                ),
            )

    def ask(self, seconds: float) -> None:
        """Tickets to members that are here and do not hold one, and after a long silence once more: Flower
        hands a message out once, and if the
        connection breaks just then the node never sees it. A site that has it already answers both with one
        update."""
        now = time.monotonic()
        for name, ask in self.open.items():
            node = self.transport.members.at.get(name, 0)
            holds = self.sent.get(name) == node and now < self.silent.get(name, now)
            if node and not holds and now >= self.pause.get(name, 0.0):
                self.sent[name] = self.transport.members.ask(
                    name, self._ticket(name, ask, seconds), max(seconds, 1.0)
                )
                self.turns[name] = self.turns.get(name, 0) + 1
                self.silent[name] = now + SILENT * 2.0 ** (self.turns[name] - 1)

    def _ticket(self, name: str, ask: Ask, seconds: float) -> bytes:
        c, now, issued = self.transport, ask.now, time.time_ns() // 1000
        details = Details(
            c.recipe,
            ask.client,
            now.seed,
            now.members,
            ask.last,
            ask.first,
            c.tells(ask, name),
            issued,
            issued + int(1e6 * (max(seconds, 1.0) + SKEW)),
        )
        attempt = c.attempts.get((now.number, ask.verb, ask.client), 1)
        about = Ticket(
            RunName(c.run),
            now.number,
            MemberName(name),
            VerbName(ask.verb),
            "",
            c.link.base,
            self.hashes[ask.client],
            len(ask.payload),
            self.budget,
            attempt,
            details.encode(),
            protocol=self.protocol(name),
        )
        return ticket.write(about, c.coordinator())

    def protocol(self, name: str) -> int:
        """The newest that this coordinator and the site both speak."""
        newest = self.transport.members.reports.get(name, {}).get("protocol", PROTOCOL)
        return min(PROTOCOL, newest) if isinstance(newest, int) else PROTOCOL

    def again(self, name: str) -> None:
        """The next ticket of a member is another attempt: an answer of before is not what is wanted."""
        ask = self.open[name]
        key = (ask.now.number, ask.verb, ask.client)
        self.transport.attempts[key] = self.transport.attempts.get(key, 1) + 1
        self.sent.pop(name, None)

    def failures(self) -> Iterator[Reply]:
        """Members that say they cannot; those whose node was lost, or that may manage later, are asked
        again."""
        for name, outcome in self.transport.members.answers():
            if name not in self.open:
                continue
            if outcome is None:
                self.sent.pop(name, None)
            elif not outcome.get("code"):
                self.said[name] = outcome.get("said", "")
                self.again(
                    name
                    # its update is there; or was lost here after the receipt, and the next attempt has no
                    # receipt
                    # yet
                )
                self.pause[name] = time.monotonic() + AGAIN
            elif outcome["code"].startswith(LATER):
                self.words[name] = str(heard(outcome, name))
                if outcome["code"] in GONE:
                    self.transport.server_store.offer(self.transport.run, self.open[name].payload)
                self.sent.pop(name, None)
                self.pause[name] = time.monotonic() + AGAIN
            else:
                yield self._failed(name, heard(outcome, name))

    def accepted(self) -> Iterator[Reply]:
        """Updates that the exchange holds."""
        if not self.open:
            return
        c, any_ask = self.transport, next(iter(self.open.values()))
        for update in c.server_store.accepted(c.run, any_ask.now.number, any_ask.verb):
            ask = self.open.get(update.client)
            if ask is None:
                continue
            try:
                payload = c.server_store.read(c.run, ask.now.number, ask.verb, update.client)
            except FedtuneError as error:
                if error.code not in GONE:
                    raise
                self.again(update.client)
                continue
            del self.open[update.client]
            self.counted += 1
            c.came(update.client, True)
            yield Reply(ask.client, payload, said=self.said.get(update.client, ""))

    def missing(self, wanted: int) -> Iterator[Reply]:
        """Whoever has not answered when the question is closed."""
        for name in list(self.open):
            self.transport.came(name, self.counted >= wanted)  # whoever was not needed is not absent
            why = self.words.get(name, "") or (
                "its ticket is out" if name in self.sent else "no node of it is here"
            )
            if self.counted >= wanted:
                found, expected, do = (
                    f"an answer later than {wanted} others",
                    "one of the first",
                    "nothing: more were asked than were needed (deploy.over)",
                )
            elif self.transport.absent.get(name, 0) > ABSENT:  # not waited for, however long the others took
                found, expected, do = (
                    f"no answer to the last {self.transport.absent[name]} questions ({why})",
                    "an answer",
                    "nothing to do: it is asked again in each round",
                )
            else:
                found, expected, do = (
                    f"no answer within {self.transport.deadline:.0f} s ({why})",
                    "an answer",
                    "look at the site's log",
                )
            yield self._failed(name, ClientFailed("F503", found, expected, do))

    def closed_without(self, out: Mapping[str, str]) -> Iterator[Reply]:
        """Members that this question was closed without before the run's process was started again: a set
        that was closed stays what it was."""
        for name in [name for name in self.open if name in out]:
            said = out[name] or "no answer when the question was closed"
            sentence = f"'{name}' was left out before this run's process was started again ({said[:300]})"
            yield self._failed(name, ClientFailed("F503", sentence=sentence, do="nothing to do"))

    def _failed(self, name: str, failure: FedtuneError) -> Reply:
        self.failed[name] = failure
        return Reply(self.open.pop(name).client, failure=failure)
