"""Sums by group: one question, a sum for each group, to the bit that of a cohort of the group's members
alone, and never a single answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from fedtune.errors import ClientFailed, FedtuneError, Paused
from fedtune.events import Event, Noted
from fedtune.methods import Verb
from fedtune.methods.fedpeft import FedPEFT
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.exposure import exposure
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workspace import Workspace
from fedtune.schema import digest
from fedtune.transforms.base import Chain, Transform
from fedtune.types import Round, Tensors, Update
from tests import small
from tests.marks import mostly_thorough

CODED = {"chain": [{"step": "ternary", "keep": 0.2, "error_feedback": True}]}
DELTA = {"chain": [{"step": "quantize", "bits": 8}], "downlink": {"step": "delta"}}
MEMBERS = (0, 1, 2, 3, 4)


class Doubled(Transform):
    """A step that only a sum can undo."""

    name = "doubled"
    undone: ClassVar[Literal["reply", "sum"]] = "sum"

    def on_client(self, update: Update, client: Any, now: Round) -> Update:
        return replace(update, tensors={name: 2 * value for name, value in update.tensors.items()})

    def on_sum(self, total: Update, now: Round) -> Update:
        return replace(total, tensors={name: value / 2 for name, value in total.tensors.items()})


class Hidden(Transform):
    name = "hidden"
    hides: ClassVar[bool] = True


@pytest.fixture
def made(tiny_bert: Path, data: Path) -> tuple[Workspace, Link]:
    return small.workspace_of(small.recipe(tiny_bert, data, partition__clients=5))


def parity(client: int) -> str:
    return "odd" if client % 2 else "even"


class Grouped(FedPEFT):
    """FedPEFT, if it summed by group."""

    @property
    def verbs(self) -> Mapping[str, Verb]:
        return {name: replace(verb, by_group=True) for name, verb in super().verbs.items()}


def grouped(link: Link) -> Link:
    method = link.method
    assert isinstance(method, FedPEFT)
    return replace(link, method=Grouped(method.settings, method.rounds, method.rule))


Wrap = Callable[[Transport], Transport]


def cohort_of(
    made: tuple[Workspace, Link],
    members: Sequence[int] = MEMBERS,
    wrap: Wrap = lambda transport: transport,
    tell: Callable[[Event], None] = lambda event: None,
) -> RoundCohort:
    """A round of clients that remember nothing."""
    workspace, link = made[0], grouped(made[1])
    transport = wrap(
        local_transport(link, lambda ask: workspace.client_with(ask.client, {}), lambda ask, client: None)
    )
    return RoundCohort(link, Round(1, 3, tuple(members)), transport, tell, workspace.names)


def failing(*clients: int) -> Wrap:
    """Some members fail instead of answering."""

    def wrap(transport: Transport) -> Transport:
        def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
            yield from (
                Reply(ask.client, failure=ClientFailed("F503", "no answer", "one", "wait"))
                for ask in asks
                if ask.client in clients
            )
            yield from transport([ask for ask in asks if ask.client not in clients])

        return carry

    return wrap


def same(one: Update, other: Update) -> bool:
    return digest(one.tensors) == digest(other.tensors) and (one.weight, one.metrics) == (
        other.weight,
        other.metrics,
    )


@pytest.mark.parametrize(
    "changes",
    mostly_thorough([{}, CODED, DELTA, "sum"], [CODED, "sum"]),
    ids=["plain", "coded", "delta", "undone on the sum"],
)
def test_a_groups_sum_is_that_of_a_cohort_of_its_members_alone(
    changes: Any, tiny_bert: Path, data: Path
) -> None:
    workspace, link = small.workspace_of(
        small.recipe(tiny_bert, data, partition__clients=5, **({} if changes == "sum" else changes))
    )
    link = (
        replace(link, chain=Chain([Doubled()]))
        if changes == "sum"
        else replace(link, downlink=workspace.recipe.downlink)
    )
    given = link.method.start(workspace.tunable).shared
    whole = cohort_of((workspace, link))
    sums = whole.sum_groups("train", given, parity)
    assert list(sums) == ["even", "odd"]
    for name, members in (("even", (0, 2, 4)), ("odd", (1, 3))):
        assert same(sums[name], cohort_of((workspace, link), members).sum("train", given))
    assert {client: answer.outcome for client, answer in whole.answers.items()} == dict.fromkeys(
        MEMBERS, "ok"
    )
    everyone = cohort_of((workspace, link))
    everyone.sum("train", given)
    assert whole.metrics == everyone.metrics and [a.up_bytes for a in whole.answers.values()] == [
        a.up_bytes for a in everyone.answers.values()
    ]


@pytest.mark.parametrize("changes", [{}, CODED], ids=["plain", "coded"])
def test_groups_may_be_given_tensors_of_their_own(changes: Any, tiny_bert: Path, data: Path) -> None:
    made = small.workspace_of(small.recipe(tiny_bert, data, partition__clients=5, **changes))
    start = made[1].method.start(made[0].tunable).shared
    own = {
        "even": start,
        "odd": {name: np.asarray(value + np.float32(0.01)) for name, value in start.items()},
    }
    asked: list[str] = []

    def given(group: str) -> Tensors:
        asked.append(group)
        return own[group]

    sums = cohort_of(made).sum_groups("train", given, parity)
    assert asked == ["even", "odd"]  # once a group, so that its members share the bytes
    for name, members in (("even", (0, 2, 4)), ("odd", (1, 3))):
        assert same(sums[name], cohort_of(made, members).sum("train", own[name]))


def test_every_member_is_asked_once(made: tuple[Workspace, Link]) -> None:
    asked: list[int] = []

    def counting(transport: Transport) -> Transport:
        def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
            asked.extend(ask.client for ask in asks)
            yield from transport(asks)

        return carry

    cohort_of(made, wrap=counting).sum_groups("train", made[1].method.start(made[0].tunable).shared, parity)
    assert asked == list(MEMBERS)


def test_who_is_in_no_group_is_not_asked(made: tuple[Workspace, Link]) -> None:
    given = made[1].method.start(made[0].tunable).shared
    whole = cohort_of(made)
    sums = whole.sum_groups("train", given, lambda client: "some" if client in (1, 2, 4) else None)
    assert same(sums["some"], cohort_of(made, (1, 2, 4)).sum("train", given))
    assert sorted(whole.answers) == [1, 2, 4]


def test_single_answers_of_some_members(tiny_bert: Path, data: Path) -> None:
    made = small.workspace_of(small.recipe(tiny_bert, data, aggregate={"rule": "median"}))
    given = made[1].method.start(made[0].tunable).shared
    some = cohort_of(made, (0, 1, 2, 3))
    answers = dict(some.each("train", given, [3, 1]))
    assert list(answers) == [1, 3] == sorted(some.answers)
    assert same(answers[3], dict(cohort_of(made, (0, 1, 2, 3)).each("train", given))[3])


def test_a_group_that_is_too_small_is_refused_before_anybody_is_asked(made: tuple[Workspace, Link]) -> None:
    def nobody(transport: Transport) -> Transport:
        return lambda asks: pytest.fail("somebody was asked")

    given = made[1].method.start(made[0].tunable).shared
    with pytest.raises(
        FedtuneError, match="R412: found 1 members of group 'True' in round 1, expected at least 2"
    ):
        cohort_of(made, wrap=nobody).sum_groups("train", given, lambda client: client == 3)
    with pytest.raises(
        FedtuneError, match="R412: found 2 members of group 'odd' in round 1, expected at least 3"
    ):
        cohort_of(made, wrap=nobody).sum_groups("train", given, parity, min_group=3)
    with pytest.raises(
        RuntimeError, match="sums of single answers to 'train' without declaring it in reads_each"
    ):
        cohort_of(made, wrap=nobody).sum_groups("train", given, lambda client: client, min_group=1)


def test_who_reads_sums_of_groups_says_so_and_users_are_told(made: tuple[Workspace, Link]) -> None:
    workspace, link = made
    given = link.method.start(workspace.tunable).shared
    silent = RoundCohort(
        link,
        Round(1, 3, MEMBERS),
        lambda asks: pytest.fail("somebody was asked"),
        lambda event: None,
        workspace.names,
    )
    with pytest.raises(
        RuntimeError, match="sums of groups of answers to 'train' without declaring it in by_group"
    ):
        silent.sum_groups("train", given, parity)

    def seen(link: Link, *steps: Transform) -> str:
        return next(
            row.sees
            for row in exposure(link.method, Chain(list(steps)), workspace.tunable)
            if row.verb == "train"
        )

    assert seen(link).endswith("uses the sum only") and seen(link, Hidden()) == "the sum only"
    assert seen(grouped(link)).endswith("uses each group's sum only")
    assert seen(grouped(link), Hidden()) == "each group's sum only"


def test_groups_of_one_are_single_answers_for_a_method_that_says_that_it_reads_them(
    tiny_bert: Path, data: Path
) -> None:
    made = small.workspace_of(small.recipe(tiny_bert, data, aggregate={"rule": "median"}))
    assert made[1].tasks["train"].reads_each
    given = made[1].method.start(made[0].tunable).shared
    sums = cohort_of(made, (0, 1, 2)).sum_groups("train", given, lambda client: client, min_group=1)
    for client, update in cohort_of(made, (0, 1, 2)).each("train", given):
        assert same(sums[client], update)


def test_a_group_of_which_too_few_answered_is_left_out_and_its_answers_do_not_count(
    made: tuple[Workspace, Link],
) -> None:
    given = made[1].method.start(made[0].tunable).shared
    told: list[Event] = []
    cohort = cohort_of(
        made, wrap=failing(3), tell=told.append
    )  # of 1 and 3, one answer came: its sum would be that answer
    sums = cohort.sum_groups("train", given, parity)
    even = cohort_of(made, (0, 2, 4))
    assert list(sums) == ["even"] and same(sums["even"], even.sum("train", given))
    assert {client: answer.outcome for client, answer in cohort.answers.items()} == {
        0: "ok",
        1: "R412",
        2: "ok",
        3: "F503",
        4: "ok",
    }
    assert cohort.answers[1].weight == 0 and cohort.answers[1].up_bytes > 0 and cohort.metrics == even.metrics
    assert [
        "left out: group 'odd'. R412: found 1 usable answers" in event.text
        for event in told
        if isinstance(event, Noted)
    ] == [True]


def test_a_group_of_which_nobody_answered_is_left_out_and_told(made: tuple[Workspace, Link]) -> None:
    told: list[Event] = []
    cohort = cohort_of(made, wrap=failing(0, 2, 4), tell=told.append)
    assert list(cohort.sum_groups("train", made[1].method.start(made[0].tunable).shared, parity)) == ["odd"]
    notes = [event.text for event in told if isinstance(event, Noted)]
    assert (
        len(notes) == 1
        and "found 0 usable answers from the 3 members of group 'even'" in notes[0]
        and cohort.answers[0].outcome == "F503"
    )


def test_without_any_group_the_round_fails_and_below_the_quorum_it_pauses(
    made: tuple[Workspace, Link],
) -> None:
    given = made[1].method.start(made[0].tunable).shared
    with pytest.raises(FedtuneError, match="R405: found no usable answer from 5 clients"):
        cohort_of(made, wrap=failing(*MEMBERS)).sum_groups("train", given, parity)
    cohort = cohort_of(made, wrap=failing(3))
    cohort.quorum = 4
    with pytest.raises(Paused, match="R409: found 3 usable answers"):
        cohort.sum_groups("train", given, parity)
