"""Clients that several processes answer for: the same run, whatever becomes of the processes, and none is
left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import Paused
from fedtune.runtime import client_half
from fedtune.runtime import workers as module
from fedtune.runtime.journal import Journal
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workers import Workers, hindrance, workers_for
from fedtune.runtime.workspace import Workspace
from fedtune.types import Client
from tests import small
from tests.conformance.recipes import METHODS
from tests.marks import mostly_thorough
from tests.waiting import require_ended

MANY = (
    "fedpeft-lora",
    "fedpeft-chain",
    "fedpeft-both-ways",
    "fedpeft-flora",
    "fedpeft-lda",
    "experts-clusters",
    "fedkseed-steps",
    "fedkseed-mixed",
)


@pytest.fixture(autouse=True)
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own process may have a thread of the test runner's, which holds no lock."""
    monkeypatch.setattr(module, "can_fork", lambda: True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Workers]]:
    """Transports that `side_by_side` made; at the end none of their processes is alive."""
    transports, pids, fork = list[Workers](), list[int](), Workers._fork

    def forked(self: Workers) -> Any:
        worker = fork(self)
        pids.append(worker.pid)
        transports.append(self)
        return worker

    monkeypatch.setattr(Workers, "_fork", forked)
    yield transports
    require_ended(pids)


def side_by_side(count: int, logs: Path) -> Any:
    def carry(link: Link, workspace: Workspace) -> Transport:
        return Workers(link, workspace, logs, count)

    return carry


@pytest.mark.parametrize("name", mostly_thorough(MANY, ["fedpeft-chain"]))
def test_any_number_of_workers_makes_the_same_run(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path, made: list[Workers]
) -> None:
    recipe = small.recipe(tiny_bert, data, **METHODS[name])
    alone, want, _ = small.play(recipe, tmp_path / "alone")
    folder, got, _ = small.play(recipe, tmp_path / "three", carry=side_by_side(3, tmp_path / "logs"))
    assert got["state_sha256"] == want["state_sha256"]
    journals = [Journal(one.journal) for one in (alone, folder)]
    first, second = (list(journal.answers()) for journal in journals)
    assert first == second  # outcomes, weights, bytes both ways, and the hash of what each client remembers
    assert len(made) == 3


def test_a_client_that_fails_is_left_out_by_the_same_words(
    tiny_bert: Path, data: Path, tmp_path: Path, made: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small.recipe(tiny_bert, data)
    opened = client_half.opened

    def failing(link: Link, client: Client, ask: Ask) -> Any:
        if ask.client == 2:
            raise ValueError("of one client")
        return opened(link, client, ask)

    monkeypatch.setattr(client_half, "opened", failing)
    _, result, _ = small.play(recipe, tmp_path / "run", carry=side_by_side(2, tmp_path / "logs"))
    monkeypatch.setattr("fedtune.runtime.local.opened", failing)
    _, want, _ = small.play(recipe, tmp_path / "alone")
    assert result["state_sha256"] == want["state_sha256"] and result["left_out"] == want["left_out"] == 3
    assert "of one client" in (tmp_path / "logs" / "client-2.txt").read_text()


def test_a_worker_that_is_killed_costs_the_answer_it_worked_on(
    tiny_bert: Path, data: Path, tmp_path: Path, made: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small.recipe(tiny_bert, data)
    respond, here = module.respond, os.getpid()

    def deadly(link: Link, client: Client, ask: Ask) -> Reply:
        if (ask.client, ask.now.number) in ((1, 1), (3, 2)) and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return respond(link, client, ask)

    monkeypatch.setattr(module, "respond", deadly)
    _, result, events = small.play(recipe, tmp_path, carry=side_by_side(2, tmp_path / "logs"))
    assert result["left_out"] == 2  # and the third round was done without workers
    assert sum("was ended, probably for want of memory" in str(e) for e in events) == 2


def test_a_pause_ends_the_run_and_the_workers(
    tiny_bert: Path, data: Path, tmp_path: Path, made: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pausing(link: Link, client: Client, ask: Ask) -> Reply:
        raise Paused("R409", sentence="somebody else paused", do="resume")

    monkeypatch.setattr(module, "respond", pausing)
    with pytest.raises(Paused, match="somebody else"):
        small.play(small.recipe(tiny_bert, data), tmp_path, carry=side_by_side(2, tmp_path / "logs"))


def test_how_many_there_are(tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small.recipe(tiny_bert, data)
    workspace, link = small.workspace_of(recipe)
    monkeypatch.setattr(module, "available_cores", lambda: 3)
    assert workers_for(recipe, workspace, link.method) == (1, "")  # a tiny model
    assert workers_for(recipe, workspace, link.method, 2) == (2, "")
    assert workers_for(recipe, workspace, link.method, 9) == (4, "")  # there are four clients
    monkeypatch.setattr(module, "WORTH", 0)
    assert workers_for(recipe, workspace, link.method) == (3, "")
    threads = small.recipe(tiny_bert, data, model__threads=2)
    assert workers_for(threads, workspace, link.method)[0] == 1
    assert "set model.threads = 1" in workers_for(threads, workspace, link.method, 2)[1]
    monkeypatch.setattr(module, "can_fork", lambda: False)
    assert "threads of its own" in hindrance(recipe, workspace, link.method)
    split = small.recipe(tiny_bert, data, **METHODS["sfprompt-slim"])
    assert "middle of the model" in hindrance(split, *small.workspace_of(split)[:1], link_method(split))
    masked = small.recipe(tiny_bert, data, **METHODS["fedpeft-mask"])
    assert "secrets of masked sums" in hindrance(masked, workspace, link.method)


def link_method(recipe: Any) -> Any:
    return small.workspace_of(recipe)[1].method
