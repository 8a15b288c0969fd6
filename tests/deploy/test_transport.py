"""One question as a coordinator keeps it: which words end it for a member, and what is said of whoever did not answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.deploy.transport import ABSENT, LOST, Exchanged, Question
from fedtune.runtime.protocol import Ask
from fedtune.types import Round

NAMES = ("site-a", "site-b")
Words = Mapping[str, str] | None


class Exchange:
    """Holds what it was given as accepted, and notes what is offered."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.offers: list[bytes] = []

    def accepted(self, run: str, number: int, verb: str) -> list[Any]:
        return [SimpleNamespace(client=name) for name in self.held]

    def read(self, run: str, number: int, verb: str, client: str) -> bytes:
        return self.held[client]

    def offer(self, run: str, payload: bytes) -> None:
        self.offers.append(payload)


def question(*answers: tuple[str, Words], absent: Mapping[str, int] | None = None) -> Question:
    """Both sites are asked, and Flower brings `answers`."""

    def arrived() -> Iterator[tuple[str, Words]]:
        yield from answers

    unused: Any = None  # what tickets and whole questions are made with
    flower: Any = SimpleNamespace(answers=arrived)
    exchange: Any = Exchange()
    transport = Exchanged(
        exchange, flower, unused, unused, "run", "", NAMES, 60.0, unused, unused, absent=dict(absent or {})
    )
    now = Round(1, 3, (0, 1))
    return Question(transport, {name: Ask(n, "train", now, b"state") for n, name in enumerate(NAMES)}, {}, 1)


def test_a_word_of_somebody_else_does_not_hide_the_next_one() -> None:
    asked = question(("a stranger", {"code": "W607"}), ("site-b", {"code": "W607"}))
    (reply,) = asked.failures()
    assert reply.client == 1 and reply.failure is not None and reply.failure.code == "W607"
    assert list(asked.open) == ["site-a"]


def test_what_a_site_said_stands_beside_its_own_update() -> None:
    asked = question(("site-a", {"code": "", "said": "a"}), ("site-b", {"code": "", "said": "b"}))
    assert not list(asked.failures())
    asked.transport.server_store.held = {"site-b": b"B", "site-a": b"A"}  # type: ignore[attr-defined]
    assert {(reply.client, reply.payload, reply.said) for reply in asked.accepted()} == {
        (0, b"A", "a"),
        (1, b"B", "b"),
    }
    assert asked.counted == 2 and not asked.open


@pytest.mark.parametrize(("code", "offered"), [("E803", [b"state"]), ("E807", [b"state"]), ("R404", [])])
def test_a_state_that_is_gone_is_offered_again_and_the_member_asked_again(
    code: str, offered: list[bytes]
) -> None:
    asked = question(("site-a", {"code": code}))
    assert not list(asked.failures()) and set(asked.open) == set(NAMES)
    assert asked.transport.server_store.offers == offered and asked.pause  # type: ignore[attr-defined]


def test_a_member_that_lost_its_broadcast_is_left_out_at_once() -> None:
    (reply,) = question(("site-a", {"code": LOST})).failures()
    assert reply.failure is not None and reply.failure.code == LOST


def test_whoever_is_absent_is_said_to_be_and_whoever_was_only_late_is_not() -> None:
    said = [
        str(reply.failure)
        for reply in question(absent={"site-a": ABSENT, "site-b": ABSENT - 1}).missing(wanted=1)
    ]
    assert f"no answer to the last {ABSENT + 1} questions" in said[0] and "no answer within 60 s" in said[1]
    late = question(absent={"site-a": ABSENT})
    late.counted = 1
    assert all("later than 1 others" in str(reply.failure) for reply in late.missing(wanted=1))
    assert late.transport.absent == {"site-a": 0, "site-b": 0}
