"""Who is let in at a greeting: forged, replayed, foreign and unreadable answers are told apart from a
member's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.deploy.coordinator_run import judge_of
from fedtune.flower import nodes as flower_nodes
from fedtune.flower.nodes import Nodes, described
from fedtune.trust import Identity, load
from fedtune.trust.authority import Authority, create, revoke
from fedtune.trust.signed import seal
from tests.deploy.inside import FakeGrid, lost
from tests.waiting import PATIENCE, wait_for

NODE = 7


@dataclass
class Keys:
    authority: Authority
    coordinator: Identity
    sites: dict[str, Identity]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    authority = create(tmp_path_factory.mktemp("keys") / "keys", "hospitals", ["localhost"], 30)
    sites = {name: load(authority.issue(name, 30)) for name in ("site-a", "site-b", "site-c")}
    return Keys(authority, load(authority.place("coordinator")), sites)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flower_nodes, "LOOK_SECONDS", 0.0)
    yield


def greeting(identity: Identity, nonce: str, **altered: Any) -> bytes:
    """What a site's worker answers, but for what is altered."""
    record = {"nonce": nonce, "name": identity.name.name, "report": {"cores": 2}, **altered}
    return seal(json.dumps(record, sort_keys=True).encode(), identity).to_json()


def met(keys: Keys, answer: Any) -> tuple[Nodes, list[str]]:
    """One node that answers its greeting with `answer(nonce)`; the members, and what was told of those that
    were not let in."""
    told: list[str] = []

    def instead(node: int, message: Message) -> Message:
        nonce = bytes(message.content["site"]["nonce"]).hex()
        said = answer(nonce)
        return (
            said(message)
            if callable(said)
            else Message(RecordDict({"site": ConfigRecord({"sealed": said})}), reply_to=message)
        )

    nodes = Nodes(
        FakeGrid({NODE: None}, instead), judge_of(keys.coordinator, ("site-a", "site-b")), told.append
    )
    nodes.look()
    return nodes, told


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (
            {"device": "cuda:0", "memory": 24 << 30, "speed": 41234.5, "name": "x"},
            "cuda:0, 24.0 GiB free, 41,234 GFLOP/s",
        ),
        ({"device": "\x1b[2Jcpu" + 99 * "u", "memory": "much", "speed": [1]}, "[2Jcpuuuuuuuuuuuuuuu"),
        ({"memory": 10**400, "speed": float("inf")}, "inf GFLOP/s"),
        ({}, "of unknown means"),
    ],
)
def test_what_a_site_says_of_itself_is_one_short_line(report: dict[str, Any], line: str) -> None:
    assert described(report) == line


def test_a_member_is_known_by_its_signature_and_its_report_is_kept(keys: Keys) -> None:
    nodes, told = met(keys, lambda nonce: greeting(keys.sites["site-b"], nonce))
    assert (
        nodes.at == {"site-b": NODE}
        and nodes.reports == {"site-b": {"cores": 2}}
        and told == ["site-b is here: of unknown means"]
    )


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            lambda keys, nonce: greeting(keys.sites["site-a"], nonce, name="site-b"),
            "W604: found an answer to another greeting from 'site-a'",
        ),
        (
            lambda keys, nonce: greeting(keys.sites["site-a"], "00" * 16),
            "W604: found an answer to another greeting",
        ),
        (
            lambda keys, nonce: greeting(keys.sites["site-c"], nonce),
            "F502: found site 'site-c', expected one of the run's: site-a, site-b",
        ),
        (lambda keys, nonce: greeting(keys.coordinator, nonce), "F502: found site 'coordinator'"),
        (lambda keys, nonce: greeting(keys.sites["site-a"], nonce)[:-40], "W601"),
        (
            lambda keys, nonce: greeting(keys.sites["site-a"], nonce).replace(
                b'"signature": "', b'"signature": "AA'
            ),
            "T70",
        ),
        (lambda keys, nonce: b"", "W601"),
    ],
)
def test_whoever_is_not_a_member_of_the_run_is_not_let_in(keys: Keys, answer: Any, sentence: str) -> None:
    nodes, told = met(keys, lambda nonce: answer(keys, nonce))
    assert not nodes.at and told[0].startswith(f"node {NODE} is not let in") and sentence in told[0]


def test_an_answer_that_is_no_greeting_at_all_is_a_sentence_too(keys: Keys) -> None:
    nodes, told = met(
        keys, lambda nonce: lambda message: Message(RecordDict({"other": ConfigRecord({})}), reply_to=message)
    )
    assert not nodes.at and "cannot be read" in told[0]
    nodes, told = met(keys, lambda nonce: lost)
    assert not nodes.at and "F503" in told[0]


def test_a_revoked_key_is_not_let_in(tmp_path: Path) -> None:
    authority = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    site, coordinator = load(authority.issue("site-a", 30)), load(authority.place("coordinator"))
    revoke(coordinator.folder, "site-a")
    nodes, told = met(Keys(authority, coordinator, {}), lambda nonce: greeting(site, nonce))
    assert not nodes.at and "T706" in told[0]


def test_a_member_that_comes_back_at_another_node_is_asked_there(keys: Keys) -> None:
    """The newest node counts; the ticket that the old node held is lost, and that is said."""

    def instead(node: int, message: Message) -> Any:
        if message.metadata.message_type == "query.site":
            said = greeting(keys.sites["site-a"], bytes(message.content["site"]["nonce"]).hex())
            return Message(RecordDict({"site": ConfigRecord({"sealed": said})}), reply_to=message)
        return (
            lost(message)
            if node == 1
            else Message(RecordDict({"outcome": ConfigRecord({"code": ""})}), reply_to=message)
        )

    grid = FakeGrid({1: None}, instead)
    nodes = Nodes(grid, judge_of(keys.coordinator, ("site-a",)))
    nodes.look()
    assert (
        nodes.ask("site-a", b"ticket", 60) == 1
        and list(nodes.answers()) == [("site-a", None)]
        and not nodes.at
    )
    grid.workers = {2: None}
    nodes.look()
    assert nodes.ask("site-a", b"ticket", 60) == 2 and list(nodes.answers()) == [("site-a", {"code": ""})]
    assert nodes.ask("site-b", b"ticket", 60) == 0  # who is not here is not asked


def test_who_is_waited_for_is_said_when_one_comes_when_one_goes_and_seldom_in_between(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instead(node: int, message: Message) -> Any:
        if message.metadata.message_type != "query.site":
            return lost(message)
        said = greeting(keys.sites[f"site-{'abcb'[node]}"], bytes(message.content["site"]["nonce"]).hex())
        return Message(RecordDict({"site": ConfigRecord({"sealed": said})}), reply_to=message)

    told: list[str] = []
    grid, all_sites = FakeGrid({}, instead), ("site-a", "site-b", "site-c")
    nodes = Nodes(grid, judge_of(keys.coordinator, all_sites), told.append, all_sites)
    nodes.look()
    grid.workers = {1: None}
    nodes.look()
    assert told == ["site-b is here: of unknown means; waiting for 2 of 3: site-a, site-c"]
    assert (
        nodes.ask("site-b", b"ticket", 60) == 1
        and list(nodes.answers()) == [("site-b", None)]
        and not nodes.at
    )
    nodes.look()  # a lost message is no farewell: it is greeted again, and nothing is said
    assert nodes.at == {"site-b": 1} and len(told) == 1
    monkeypatch.setattr(nodes, "_pause", 0.0)
    nodes.look()
    nodes.look()
    assert told[1:] and set(told[1:]) == {"waiting for 2 of 3: site-a, site-c"}
    told.clear()
    grid.workers = {0: None, 2: None}
    nodes.look()
    assert told[0] == "site-b has gone; waiting for 3 of 3: site-a, site-b, site-c" and told[-1].endswith(
        "; waiting for 1 of 3: site-b"
    )
    grid.workers = {0: None, 2: None, 3: None}
    nodes.look()
    assert told[-1] == "site-b is here: of unknown means"


def test_an_answer_that_hangs_in_flower_keeps_no_other_waiting(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """site-a's node died after its answer and before the answer's objects: Flower's pull waits for them.
    site-b comes meanwhile."""
    monkeypatch.setattr(flower_nodes, "PULL_SECONDS", 0.1)
    monkeypatch.setattr(flower_nodes, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(flower_nodes, "GREETING_SECONDS", 0.5)
    free, whose = threading.Event(), {1: "site-a", 2: "site-b"}

    def instead(node: int, message: Message) -> Message:
        said = greeting(keys.sites[whose[node]], bytes(message.content["site"]["nonce"]).hex())
        return Message(RecordDict({"site": ConfigRecord({"sealed": said})}), reply_to=message)

    grid = FakeGrid({1: None}, instead)
    pull = grid.pull_messages

    def hanging(message_ids: Any) -> list[Message]:
        if "m0" in message_ids:
            free.wait(PATIENCE)
        return pull(message_ids)

    grid.pull_messages = hanging  # type: ignore[method-assign]
    nodes = Nodes(grid, judge_of(keys.coordinator, ("site-a", "site-b")))
    nodes.look()
    grid.workers[2] = None
    wait_for(
        lambda: nodes.look() or nodes.at == {"site-a": 1, "site-b": 2}, "both sites"
    )  # site-a is greeted once more
    free.set()


def test_what_flower_raises_is_raised_here(keys: Keys) -> None:
    grid = FakeGrid({1: None}, lambda node, message: None)

    def broken(message_ids: Any) -> list[Message]:
        raise RuntimeError("the run is over")

    grid.pull_messages = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the run is over"):
        Nodes(grid, judge_of(keys.coordinator, ("site-a",))).look()
