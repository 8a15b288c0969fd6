"""The questions of a masked sum beside the one that is masked, as tasks like every other: a client's half.

    VERB.keys     given who is asked; the client's public keys, fresh
    VERB.shares   given everybody's keys; shares of its secrets, sealed for each other member
    VERB.peers    given what others sealed for it; how many it could read
    VERB          the method's own question, whose answer leaves under masks
    VERB.opening  given whose answers came and whose did not; a share of each

Members stand in rows, in the order of the round's members; a row of zeros is nobody. Where a sum is begun
anew in the same round, names end in .2 and .3: other questions, of which no answer can be taken for an
earlier one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedtune.errors import Refused
from fedtune.methods import Work
from fedtune.privacy.masks import KEYS, SEALED, SHARE, Session
from fedtune.runtime.task import Task
from fedtune.schema import Schema
from fedtune.transforms.base import Question
from fedtune.transforms.mask import Mask, keep, name_of, session_of
from fedtune.types import Client, Round, Tensors, Update

ATTEMPTS = 3  # of one sum in one round
STAGES = ("keys", "shares", "peers", "opening")
Rows = Mapping[int, bytes]


def stage_of(verb: str, stage: str, attempt: int) -> str:
    """The name of a question of a masked sum; `stage` is "" for the answers themselves."""
    return ".".join([verb, *([stage] if stage else []), *([str(attempt)] if attempt > 1 else [])])


def root_of(verb: str) -> str:
    """What is asked in the end: a masked sum of a verb is part of that verb."""
    return verb.partition(".")[0]


def says_of_rows(verb: str) -> bool:
    """Whether an answer says anything of rows: keys, shares and openings do not."""
    return not set(verb.split(".")[1:]) & set(STAGES)


def mask_of(task: Task) -> Mask | None:
    return next((step for step in task.chain.steps if isinstance(step, Mask)), None)


def with_masks(tasks: Mapping[str, Task], run: str) -> dict[str, Task]:
    """Tasks, and those that the masked ones among them need."""
    out = dict(tasks)
    for verb, task in tasks.items():
        if not (mask := mask_of(task)):
            continue
        for attempt in range(1, ATTEMPTS + 1):
            question = replace(mask.question or Question(run, verb), attempt=attempt)
            out[stage_of(verb, "", attempt)] = replace(task, chain=task.chain.bound(question))
            for stage, made in stages(question, mask.threshold).items():
                out[stage_of(verb, stage, attempt)] = made
    return out


def stages(question: Question, threshold: float) -> dict[str, Task]:
    """The tasks of one masked sum, by stage."""

    def keys(client: Client, given: Tensors, now: Round) -> Update:
        for name in client.vault.names():  # of rounds that are over, whose secrets nobody needs any more
            if name.startswith(f"{question.run}-") and not name.startswith(f"{question.run}-{now.number}-"):
                client.vault.remove(name)
        group = rows_of(given["group"], now).keys()
        session = Session.begin(client.id, name_of(question, now), group, threshold)
        keep(client, question, now, session)
        return told("keys", np.frombuffer(session.public, np.uint8))

    def shares(client: Client, given: Tensors, now: Round) -> Update:
        after, sealed = session_of(client, question, now).share(rows_of(given["keys"], now))
        keep(client, question, now, after)
        return told("shares", table(sealed, now, SEALED))

    def peers(client: Client, given: Tensors, now: Round) -> Update:
        after = session_of(client, question, now).receive(rows_of(given["shares"], now))
        keep(client, question, now, after)
        return told("peers", np.array([len(after.held)]))

    def opening(client: Client, given: Tensors, now: Round) -> Update:
        lists = (rows_of(given[name], now).keys() for name in ("alive", "dropped"))
        after, opened = session_of(client, question, now).open(*lists)
        keep(client, question, now, after)
        return told("opening", table(opened, now, SHARE))

    return {
        "keys": task_of(keys, {"group": 1}, ("keys", (KEYS,))),
        "shares": task_of(shares, {"keys": KEYS}, ("shares", SEALED)),
        "peers": task_of(peers, {"shares": SEALED}, ("peers", (1,)), "uint32"),
        "opening": task_of(opening, {"alive": 1, "dropped": 1}, ("opening", SHARE)),
    }


def task_of(
    work: Work,
    given: Mapping[str, int],
    answer: tuple[str, int | tuple[int, ...]],
    kind: str = "uint8",
) -> Task:
    """A task whose tensors are rows of bytes; an answer that is not by member has a shape of its own."""
    name, size = answer

    def asked(model: Any, client: int, now: Round) -> Schema:
        return Schema(tuple(sorted((key, (len(now.members), width)) for key, width in given.items())))

    def said(schema: Schema, now: Round) -> Schema:
        shape = size if isinstance(size, tuple) else (len(now.members), size)
        return Schema(((name, shape),), ((name, kind, int(np.iinfo(kind).max)),))

    return Task(work, asked, said, trains=False)


def told(name: str, numbers: np.ndarray) -> Update:
    return Update({name: numbers.astype(np.int64)}, 1.0)


def table(rows: Rows, now: Round, size: int) -> np.ndarray:
    """(members, size) uint8."""
    out = np.zeros((len(now.members), size), np.uint8)
    for place, member in enumerate(now.members):
        if member in rows:
            out[place] = np.frombuffer(rows[member], np.uint8)
    return out


def rows_of(numbers: np.ndarray, now: Round) -> dict[int, bytes]:
    """The rows that are somebody's. Raises Refused W603 for numbers that are no bytes."""
    if numbers.dtype not in (np.uint8, np.int64) or (numbers.size and int(numbers.max()) > 255):
        raise Refused("W603", f"rows of {numbers.dtype}", "bytes", "use the same version on both sides")
    rows = numbers.astype(np.uint8)
    return {m: rows[place].tobytes() for place, m in enumerate(now.members) if rows[place].any()}
