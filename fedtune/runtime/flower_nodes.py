"""The members of a federation at Flower's nodes, whichever those are now: greeted as they come, forgotten as they go.

A message holds a ticket or a greeting and nothing else; states and updates travel over the exchange. A node that answers a greeting
proves by a signature which member it is, so that Flower's own service need not be trusted.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.runtime.flower import SAME, Grid, Post

SITE, TICKET = "query.site", "train.ticket"
GREETING_SECONDS = 120.0  # for a node to say who it is; Flower starts a process for every message
LOOK_SECONDS = 1.0  # between two looks at which nodes there are


@dataclass(frozen=True)
class Site:
    """What a node said of itself, under its member's signature."""

    name: str
    report: Mapping[str, Any]


Judge = Callable[[bytes, bytes], Site]  # nonce, sealed answer -> who it is; raises FedtuneError


class Nodes:
    """Questions to members through Flower's grid, by the members' names."""

    def __init__(self, grid: Grid, judge: Judge, tell: Callable[[str], None] = lambda text: None) -> None:
        self.grid, self.judge, self.tell = grid, judge, tell
        self.at: dict[str, int] = {}  # name -> node
        self.reports: dict[str, Mapping[str, Any]] = {}
        self._greeted: dict[int, tuple[bytes, float]] = {}  # node -> nonce, when
        self._hello, self._asked = Post(grid), Post(grid)
        self._names: list[str] = []  # key of a ticket under way -> name
        self._looked = 0.0

    def look(self) -> None:
        """Greet who is new, forget who has gone."""
        if time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        here = set(self.grid.get_node_ids())
        self.at = {name: node for name, node in self.at.items() if node in here}
        known = set(self.at.values())
        for node in sorted(here - known):
            if time.monotonic() < self._greeted.get(node, (b"", -1e9))[1] + GREETING_SECONDS:
                continue
            nonce = secrets.token_bytes(16)
            self._greeted[node] = nonce, time.monotonic()
            self._hello.send(node, Message(RecordDict({"site": ConfigRecord({"nonce": nonce})}), node, SITE, ttl=GREETING_SECONDS))
        for node, answer in self._hello.pull():
            self._met(node, answer)

    def _met(self, node: int, answer: Message) -> None:
        nonce, _ = self._greeted.get(node, (b"", 0.0))
        try:
            if answer.has_error():
                raise ClientFailed("F503", f"Flower's error {answer.error.code} from node {node}", "its name", "it is greeted again")
            said = bytes(answer.content["site"]["sealed"])
            site = self.judge(nonce, said)
        except FedtuneError as error:
            self.tell(f"node {node} is not let in. {error}")
            return
        except (KeyError, TypeError, AttributeError) as error:
            self.tell(f"node {node} is not let in: its answer to a greeting cannot be read ({type(error).__name__}); {SAME}.")
            return
        self.at[site.name], self.reports[site.name] = node, site.report  # a member that came back sits at a new node; the newest counts

    def ask(self, name: str, ticket: bytes, seconds: float) -> int:
        """Give a member its ticket; the node that it went to, 0 where the member is not here."""
        node = self.at.get(name, 0)
        if node:
            self._names.append(name)
            self._asked.send(len(self._names) - 1, Message(RecordDict({"ticket": ConfigRecord({"ticket": ticket})}), node, TICKET, ttl=seconds))
            if self._asked.refused:
                self._asked.refused.clear()
                self._gone(name)
                return 0
        return node

    def answers(self) -> Iterator[tuple[str, Mapping[str, str] | None]]:
        """What has come in: a member's outcome (code "": done), or None where its node was lost and it should be asked again."""
        for key, answer in self._asked.pull():
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


def read_report(text: bytes) -> Mapping[str, Any]:
    """A site's report as a table. Raises Refused (W601)."""
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise Refused("W601", "a site's report that is no table", "JSON", SAME)
    return tree
