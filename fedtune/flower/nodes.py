"""The members of a federation at Flower's nodes, whichever those are now: greeted as they come, forgotten as
they go.

A message holds a ticket or a greeting and nothing else; states and updates travel over the exchange. A node
that answers a greeting
proves by a signature which member it is, so that Flower's own service need not be trusted.
"""

from __future__ import annotations

import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.flower.messages import SAME, Grid, Post
from fedtune.forms import read_json
from fedtune.sinks.console import size

SITE, TICKET = "query.site", "train.ticket"
GREETING_SECONDS, GREETING_ENDS = (
    120.0,
    1800.0,
)  # until a node is greeted once more, for a greeting may be lost; until an answer is no longer taken
WAITING_SECONDS, LONGEST_PAUSE = (
    30.0,
    1800.0,
)  # until members that are not here are named again: twice as long each time, up to the second
LOOK_SECONDS = 1.0  # between two looks at which nodes there are
PULL_SECONDS, HANG_SECONDS = (
    1.0,
    5.0,
)  # that one look waits for Flower's answers; after which others are sent and awaited apart


@dataclass(frozen=True)
class Site:
    """What a node said of itself, under its member's signature."""

    name: str
    report: Mapping[str, Any]


Judge = Callable[[bytes, bytes], Site]  # nonce, sealed answer -> who it is; raises FedtuneError


class Pull:
    """Some messages under way, and the thread that asks Flower for their answers."""

    def __init__(self, grid: Grid) -> None:
        self.post, self.began = Post(grid), 0.0
        self._got = queue.SimpleQueue[tuple[int, Message] | BaseException]()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def hangs(self) -> bool:
        return self.busy and time.monotonic() > self.began + HANG_SECONDS

    def look(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """What has come in, waiting for it so long at most. Raises what Flower raises."""
        if not self.busy and self.post.waiting:
            self.began, self._thread = time.monotonic(), threading.Thread(target=self._pull, daemon=True)
            self._thread.start()
        if self._thread is not None:
            self._thread.join(seconds)
        while not self._got.empty():
            found = self._got.get()
            if isinstance(found, BaseException):
                raise found
            yield found

    def _pull(self) -> None:
        try:
            for answer in self.post.pull():
                self._got.put(answer)
        except BaseException as error:
            self._got.put(error)


class Mail:
    """Messages under way, of which none waits for another's answer. Where a node dies between an answer and
    its objects, Flower's pull waits for
    those until they expire (180 s, flwr 1.41, OBJECT_PUSH_SESSION_TTL_SECONDS); whatever is sent from then on
    is pulled apart from them."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self._pulls = grid, [Pull(grid)]

    def send(self, key: int, message: Message) -> bool:
        """Whether Flower took it."""
        post = self._pulls[-1].post
        post.send(key, message)
        taken = not post.refused
        post.refused.clear()
        return taken

    def pull(self) -> Iterator[tuple[int, Message]]:
        """What has come in since the last time."""
        for old in self._pulls[:-1]:
            yield from old.look(0.0)
        yield from self._pulls[-1].look(PULL_SECONDS)
        newest = [Pull(self.grid)] if self._pulls[-1].hangs else [self._pulls.pop()]
        self._pulls = [old for old in self._pulls if old.busy or old.post.waiting] + newest


class Nodes:
    """Questions to members through Flower's grid, by the members' names."""

    def __init__(
        self,
        grid: Grid,
        judge: Judge,
        tell: Callable[[str], None] = lambda text: None,
        members: Sequence[str] = (),
        bound: Callable[[], Collection[int] | None] = lambda: None,
    ) -> None:
        self.grid, self.judge, self.tell, self.members = grid, judge, tell, members
        self.bound = bound  # the nodes that members may have; None: any
        self.at: dict[str, int] = {}  # name -> node
        self.reports: dict[str, Mapping[str, Any]] = {}
        self._greeted: dict[int, tuple[bytes, float]] = {}  # node -> nonce, when
        self._hello, self._asked = Mail(grid), Mail(grid)
        self._names: list[str] = []  # key of a ticket -> name
        self._present: dict[str, int] = {}  # members that were told to be here, and at which node
        self._silent, self._pause = (
            time.monotonic(),
            WAITING_SECONDS,
        )  # since when nothing was told of who is lacking, and for how long it is well so
        self._over = 0  # tickets below this key have ended
        self._looked = 0.0

    def look(self) -> None:
        """Greet who is new, forget who has gone."""
        if time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        here, bound = set(self.grid.get_node_ids()), self.bound()
        if bound is not None:
            here &= set(bound)  # a node that is nobody's is not greeted: it costs nothing
        self.at = {name: node for name, node in self.at.items() if node in here}
        self._tell_lacking(here)
        known = set(self.at.values())
        for node in sorted(here - known):
            nonce, greeted = self._greeted.get(node, (secrets.token_bytes(16), -math.inf))
            if time.monotonic() < greeted + GREETING_SECONDS:
                continue
            self._greeted[node] = (
                nonce,
                time.monotonic(),
                # the same until it is met: on a slow machine the first answer may come after the second
                # greeting
            )
            self._hello.send(
                node,
                Message(RecordDict({"site": ConfigRecord({"nonce": nonce})}), node, SITE, ttl=GREETING_ENDS),
            )
        for node, answer in self._hello.pull():
            if (
                node in here
            ):  # a late answer of one that has gone must not stand in for the node that its member has now
                self._met(node, answer)

    def _met(self, node: int, answer: Message) -> None:
        nonce, _ = self._greeted.get(node, (b"", 0.0))
        try:
            if answer.has_error():
                raise ClientFailed(
                    "F503",
                    sentence=f"Flower reports error {answer.error.code} for node {node}",
                    do="nothing to do: it is contacted again",
                )
            said = bytes(answer.content["site"]["sealed"])
            site = self.judge(nonce, said)
        except FedtuneError as error:
            self.tell(f"node {node} is not let in. {error}")
            return
        except (KeyError, TypeError, AttributeError) as error:
            self.tell(
                f"node {node} is not let in: its answer to a greeting cannot be read "
                f"({type(error).__name__}); {SAME}."
            )
            return
        self.at[site.name], self.reports[site.name] = (
            node,
            site.report,
        )  # a member that came back sits at a new node; the newest counts
        before, self._present[site.name] = self._present.get(site.name), node
        if before is None:
            self.tell(f"{site.name} is here: {described(site.report)}{self._lacking()}")
            self._silent, self._pause = time.monotonic(), WAITING_SECONDS

    def _tell_lacking(self, here: set[int]) -> None:
        """Who has gone; and who is still waited for, less and less often."""
        gone = sorted(name for name, node in self._present.items() if node not in here)
        self._present = {name: node for name, node in self._present.items() if node in here}
        lacking = self._lacking()
        if gone:
            self.tell(f"{', '.join(gone)} {'has' if len(gone) == 1 else 'have'} gone{lacking}")
        elif lacking and time.monotonic() > self._silent + self._pause:
            self.tell(lacking.removeprefix("; "))
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        else:
            return
        self._silent = time.monotonic()

    def _lacking(self) -> str:
        """Which members are waited for, as the end of a line; "" where all are here."""
        lacking = [name for name in self.members if name not in self._present]
        names = ", ".join(lacking[:12]) + (", ..." if len(lacking) > 12 else "")
        return f"; waiting for {len(lacking)} of {len(self.members)}: {names}" if lacking else ""

    def ask(self, name: str, ticket: bytes, seconds: float) -> int:
        """Give a member its ticket; the node that it went to, 0 where the member is not here."""
        node = self.at.get(name, 0)
        if node:
            self._names.append(name)
            message = Message(
                RecordDict({"ticket": ConfigRecord({"ticket": ticket})}), node, TICKET, ttl=seconds
            )
            if not self._asked.send(len(self._names) - 1, message):
                self._gone(name)
                return 0
        return node

    def over(self) -> None:
        """All that was asked so far has ended: what still comes in of it says nothing about what is asked
        next."""
        self._over = len(self._names)

    def answers(self) -> Iterator[tuple[str, Mapping[str, str] | None]]:
        """What has come in: a member's outcome (code "": done), or None where its node was lost and it should
        be asked again."""
        for key, answer in self._asked.pull():
            if key < self._over:
                continue
            name = self._names[key]
            try:
                if answer.has_error():
                    raise KeyError
                yield name, {part: str(text) for part, text in answer.content["outcome"].items()}
            except (KeyError, TypeError, AttributeError):
                self._gone(name)
                yield name, None

    def _gone(self, name: str) -> None:
        """Greet its node again, if it is still there."""
        node = self.at.pop(name, None)
        if node is not None:
            self._greeted.pop(node, None)


def described(report: Mapping[str, Any]) -> str:
    """A site's device and means as a line; whatever it says of them is taken for numbers or left out."""
    device, speed, memory, rows = (
        report.get("device"),
        report.get("speed"),
        memory_of(report),
        report.get("rows"),
    )
    parts = [
        "".join(filter(str.isprintable, device))[:20] if isinstance(device, str) else "",
        f"{size(memory)} free" if memory else "",
        f"{speed:,.0f} GFLOP/s" if isinstance(speed, float) else "",
        f"{rows:,} rows" if isinstance(rows, int) and 0 < rows < 1 << 60 else "",
    ]
    return ", ".join(filter(None, parts)) or "of unknown means"


def memory_of(report: Mapping[str, Any]) -> int:
    """Bytes that a site says are free; 0 where what it says cannot be."""
    memory = report.get("memory")
    return memory if isinstance(memory, int) and 0 < memory < 1 << 60 else 0


def read_report(text: bytes) -> Mapping[str, Any]:
    """A site's report as a table. Raises Refused (W601)."""
    try:
        tree = read_json(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise Refused("W601", "a site's report that is not a table", "JSON", SAME)
    return tree
