"""The server's half of masked sums: asks for keys, shares and answers, opens what enough members came
through, and begins the rest anew.

Every question is one of the cohort's, over its transport; members that fail one are not asked the next.
Groups go through the steps together, each with a sum and keys of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

import numpy as np

from fedtune.errors import Refused
from fedtune.events import Event, Noted
from fedtune.privacy.masks import KEYS, SEALED, Roll, unmask
from fedtune.privacy.masks.server import valid
from fedtune.runtime.journal import StageRecord
from fedtune.runtime.masked_tasks import ATTEMPTS, mask_of, rows_of, stage_of, table
from fedtune.runtime.task import Task
from fedtune.transforms.base import Question
from fedtune.transforms.mask import Mask, flat, name_of, parts
from fedtune.types import Group, Round, RunningSum, Tensors, Update

Given = Tensors | Callable[[int], Tensors]
Answers = Iterator[tuple[int, Update]]


class Hear(Protocol):
    """Ask these members; usable answers, which count for nothing. `first`: it is their first question in the
    round; `counted`: their own answers count already."""

    def __call__(
        self, verb: str, given: Given, among: Sequence[int], first: bool, counted: bool = False
    ) -> Answers: ...


@dataclass(frozen=True)
class MaskedAsks:
    """What masked sums need of a cohort.

    hear     for the questions of the protocol
    answers  for the round's own
    seal     who came through which stage, for the journal
    begins   nobody has been asked anything in this round
    """

    hear: Hear
    answers: Callable[[str, Given, Sequence[int], bool], Answers]
    seal: list[StageRecord]
    tell: Callable[[Event], None]
    begins: bool


def masked_sums(
    task: Task, run: str, now: Round, verb: str, given: Given, group: Mapping[int, Group], asks: MaskedAsks
) -> tuple[dict[Group, RunningSum], dict[Group, int]]:
    """Unmasked sums by group; and of groups whose sum was not opened in ATTEMPTS attempts, how many members
    came through the step at which it failed."""
    mask = mask_of(task)
    assert mask is not None
    sums, short, left = dict[Group, RunningSum](), dict[Group, int](), dict(group)
    for number in range(1, ATTEMPTS + 1):
        question = Question(run, verb, attempt=number)
        attempt = Attempt(mask, question, now, verb, left, asks)
        sums |= attempt.sums(given)
        short = attempt.short
        left = {client: name for client, name in left.items() if name in short}
        if not left:
            break
        again = (
            "it is begun anew, with fresh keys" if number < ATTEMPTS else "no further attempt in this round"
        )
        asks.tell(
            Noted(
                f"round {now.number}: the masked sum of '{verb}' was not opened, {min(short.values())} of "
                f"{len(left)} members came through; {again}"
            )
        )
    return sums, short


@dataclass
class Attempt(Generic[Group]):
    """One sum for each group, from the keys to the opening."""

    mask: Mask
    question: Question
    now: Round
    verb: str
    group: dict[int, Group]
    asks: MaskedAsks
    short: dict[Group, int] = field(
        default_factory=dict
    )  # groups that are through, by how many came that far

    def sums(self, given: Given) -> dict[Group, RunningSum]:
        rolls = self.rolls()
        sealed = self.shares(rolls)
        sums, alive = self.answers(rolls, self.peers(sealed), given)
        return self.opened(rolls, sealed, sums, alive)

    def stage(
        self, name: str, given: Callable[[int], Tensors], among: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Answers to one question, by member; nobody is asked nothing."""
        verb = stage_of(self.verb, name, self.question.attempt)
        first = self.asks.begins and name == "keys"  # of another attempt too: it has the same client states
        heard = self.asks.hear(verb, given, among, first, name == "opening") if among else iter(())
        came = {client: update.tensors[name] for client, update in heard}
        self.sealed(name, came)
        return came

    def sealed(self, name: str, came: Mapping[int, Any]) -> None:
        members = tuple(sorted(came))
        self.asks.seal.append(StageRecord(self.verb, self.question.attempt, name, members))

    def rolls(self) -> dict[Group, Roll]:
        """Fresh keys of everybody."""
        asked = {
            name: {"group": table(dict.fromkeys(self.of(name), b"\1"), self.now, 1)}
            for name in dict.fromkeys(self.group.values())
        }
        came = self.stage("keys", lambda client: asked[self.group[client]], sorted(self.group))
        keys = {client: key for client, said in came.items() if valid(key := said.astype(np.uint8).tobytes())}
        rolls = {}
        for name in asked:
            mine = {client: keys[client] for client in self.of(name) if client in keys}
            roll = Roll(name_of(self.question, self.now), self.of(name), self.mask.threshold, mine)
            self.go_on(name, len(mine), roll.enough)
            rolls[name] = roll
        return rolls

    def shares(self, rolls: Mapping[Group, Roll]) -> dict[int, dict[int, bytes]]:
        """What each member sealed for each other."""
        keys = {name: {"keys": table(roll.keys, self.now, KEYS)} for name, roll in rolls.items()}
        among = self.still([client for roll in rolls.values() for client in roll.keys])
        came = self.stage("shares", lambda client: keys[self.group[client]], among)
        self.require(rolls, came)
        return {client: rows_of(said, self.now) for client, said in came.items()}

    def peers(self, sealed: Mapping[int, Mapping[int, bytes]]) -> dict[int, np.ndarray]:
        """Everybody gets what was sealed for it."""

        def given(client: int) -> Tensors:
            mine = {
                other: rows[client]
                for other, rows in sealed.items()
                if client in rows and self.group[other] == self.group[client]
            }
            return {"shares": table(mine, self.now, SEALED)}

        return self.stage("peers", given, self.still(sealed))

    def answers(
        self, rolls: Mapping[Group, Roll], ready: Mapping[int, np.ndarray], given: Given
    ) -> tuple[dict[Group, RunningSum], dict[Group, list[int]]]:
        """The round's own question, answered under masks."""
        self.require(rolls, ready)
        sums = {name: RunningSum() for name in rolls}
        alive: dict[Group, list[int]] = {name: [] for name in rolls}
        verb, among = stage_of(self.verb, "", self.question.attempt), self.still(ready)
        for client, update in self.asks.answers(verb, given, among, False) if among else iter(()):
            sums[self.group[client]].add(update)
            alive[self.group[client]].append(client)
        came = {client: name for name, members in alive.items() for client in members}
        self.sealed("answers", came)
        self.require(rolls, came)
        return sums, alive

    def opened(
        self,
        rolls: Mapping[Group, Roll],
        sealed: Mapping[int, Any],
        sums: Mapping[Group, RunningSum],
        alive: Mapping[Group, list[int]],
    ) -> dict[Group, RunningSum]:
        """Shares of those who came and those who did not; sums without masks."""
        lost = {name: [c for c in sealed if self.group[c] == name and c not in alive[name]] for name in rolls}
        lists = {
            name: {
                "alive": table(dict.fromkeys(alive[name], b"\1"), self.now, 1),
                "dropped": table(dict.fromkeys(lost[name], b"\1"), self.now, 1),
            }
            for name in rolls
        }
        among = self.still([client for members in alive.values() for client in members])
        came = self.stage("opening", lambda client: lists[self.group[client]], among)
        out = {}
        for name, roll in rolls.items():
            total = sums[name].total
            if name in self.short or total is None:
                continue
            given = {
                client: rows_of(said, self.now) for client, said in came.items() if client in alive[name]
            }
            vector = flat(total.tensors)
            try:
                unmask(vector, roll, alive[name], lost[name], given)
            except Refused:
                self.short[name] = len(given)
                continue
            sums[name].total = Update(parts(vector, total.tensors), total.weight, total.metrics)
            out[name] = sums[name]
        return out

    # --- who goes on

    def of(self, name: Group) -> tuple[int, ...]:
        return tuple(sorted(client for client, mine in self.group.items() if mine == name))

    def still(self, clients: Any) -> list[int]:
        """Those whose group goes on."""
        return sorted(client for client in clients if self.group[client] not in self.short)

    def require(self, rolls: Mapping[Group, Roll], came: Mapping[int, Any]) -> None:
        for name, roll in rolls.items():
            count = sum(self.group[client] == name for client in came)
            self.go_on(name, count, count >= roll.needed)

    def go_on(self, name: Group, count: int, enough: bool) -> None:
        if not enough and name not in self.short:
            self.short[name] = count
