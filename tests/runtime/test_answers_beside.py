"""In the local engine a client trains while the answer of the one before is encoded; answers come in
order."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientFailed, Paused
from fedtune.runtime import local
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask
from fedtune.types import Round
from fedtune.wire import EVERYONE, encode_state
from tests import small

MEMBERS = (0, 1, 2, 3)
PATIENCE = 60.0  # seconds, which only a hang can reach


def asked(tiny_bert: Path, data: Path) -> tuple[Any, Any, list[Ask]]:
    chain = [{"step": "quantize", "bits": 8, "error_feedback": True}]
    workspace, link = small.workspace_of(small.recipe(tiny_bert, data, chain=chain))
    now = Round(1, 3, MEMBERS)
    shared = link.method.start(workspace.tunable).shared
    task = link.tasks["train"]
    header = replace(link.header("train", EVERYONE, now, task.given(workspace.tunable, 0, now)))
    payload = encode_state(shared, header)
    return workspace, link, [Ask(member, "train", now, payload, 0, True) for member in MEMBERS]


def test_answers_are_encoded_while_others_train(
    tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, link, asks = asked(tiny_bert, data)
    trains = {member: threading.Event() for member in MEMBERS}
    plain, waited = local.answered, list[bool]()

    def client(ask: Ask) -> Any:
        trains[ask.client].set()
        return workspace.client(ask)

    def answered(link: Any, one: Any, ask: Ask, *rest: Any) -> Any:
        if ask.client + 1 in trains:
            waited.append(trains[ask.client + 1].wait(PATIENCE))
        return plain(link, one, ask, *rest)

    monkeypatch.setattr(local, "answered", answered)
    replies = list(local_transport(link, client, workspace.done)(asks))
    assert waited == [True] * 3 and [reply.client for reply in replies] == list(MEMBERS)
    assert not any(reply.failure for reply in replies) and all(reply.seconds > 0 for reply in replies)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("answers")]


def test_bytes_and_memories_are_those_of_one_after_the_other(tiny_bert: Path, data: Path) -> None:
    ends = []
    for at_once in (True, False):
        workspace, link, asks = asked(tiny_bert, data)
        carry = local_transport(link, workspace.client, workspace.done)
        replies = list(carry(asks)) if at_once else [reply for ask in asks for reply in carry([ask])]
        kept = {m: workspace.client_states.of(m)[1] for m in MEMBERS}
        ends.append(([reply.payload for reply in replies], kept))
    assert ends[0][0] == ends[1][0] and len(set(ends[0][0])) == len(MEMBERS)
    for member in MEMBERS:
        one, other = ends[0][1][member], ends[1][1][member]
        assert one.keys() == other.keys() and one
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_who_fails_is_left_out_in_turn_and_a_pause_ends_it(
    tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, link, asks = asked(tiny_bert, data)
    plain = local.answered

    def client(ask: Ask) -> Any:
        if ask.client == 1:
            raise ClientFailed("D205", "nothing", "something", "give it rows")
        if ask.client == 3:
            raise Paused("R409", "nothing", "something", "wait")
        return workspace.client(ask)

    def answered(link: Any, one: Any, ask: Ask, *rest: Any) -> Any:
        if ask.client == 2:
            raise ClientFailed("W607", "nan", "numbers", "look")
        return plain(link, one, ask, *rest)

    monkeypatch.setattr(local, "answered", answered)
    came = []
    with pytest.raises(Paused):
        for reply in local_transport(link, client, workspace.done)(asks):
            came.append((reply.client, reply.failure.code if reply.failure else ""))
    assert came == [(0, ""), (1, "D205"), (2, "W607")]
