"""LoRA experts: what equals fedpeft, what a group's expert is, who is never alone, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import ClientDone
from fedtune.experts.state import experts_of, general_of, groups_of
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workspace import Workspace
from fedtune.schema import digest
from fedtune.types import Round, State
from tests import small
from tests.marks import mostly_thorough
from tests.small import HALVES


def experts(model: Path, data: Path, by: dict[str, Any], **changes: Any) -> Any:
    return small.recipe(model, data, method__type="experts", method__experts=by, **changes)


def end(recipe: Any, root: Path, **more: Any) -> tuple[State, Any]:
    folder, result, _ = small.play(recipe, root, **more)
    return load_state(folder, recipe.rounds, "")[0], result


@pytest.mark.parametrize("rule", mostly_thorough(["mean", "ffa", "rolora"], ["mean"]))
def test_the_general_expert_is_fedpefts_adapter_to_the_bit(
    rule: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    coded = {
        "chain": [{"step": "quantize", "bits": 8}],
        "aggregate": {"rule": rule},
        "downlink": {"step": "none"},
    }
    plain, result = end(small.recipe(tiny_bert, data, **coded), tmp_path / "plain")
    state, _ = end(experts(tiny_bert, data, HALVES, **coded), tmp_path / "experts")
    assert set(experts_of(state.shared)) == {"a", "b"}
    assert digest(general_of(state.shared)) == digest(plain.shared) == result["state_sha256"]


def test_without_groups_a_run_is_fedpefts_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Clients of one kind are not told apart: there is the general expert and no other."""
    want = small.play(small.recipe(tiny_bert, data), tmp_path / "plain")[1]["state_sha256"]
    for number, by in enumerate(({"warm_up": 3}, {"warm_up": 1}, HALVES | {"groups": [""]})):
        state, result = end(experts(tiny_bert, data, by), tmp_path / str(number))
        assert result["state_sha256"] == want and not experts_of(state.shared)


def cohort_of(workspace: Workspace, link: Link, now: Round, carry: Any = None) -> RoundCohort:
    transport = local_transport(
        link, lambda ask: workspace.client_with(ask.client, {}), lambda ask, done: None
    )
    return RoundCohort(
        link, now, carry(transport) if carry else transport, lambda event: None, workspace.names
    )


def test_a_groups_expert_is_that_of_a_round_with_its_clients_alone(tiny_bert: Path, data: Path) -> None:
    workspace, link = small.workspace_of(experts(tiny_bert, data, HALVES, partition__clients=5))
    method: Any = link.method
    start = method.start(workspace.tunable)
    now = Round(2, 3, (0, 1, 2, 3, 4))
    state = method.round(start, cohort_of(workspace, link, now), now)
    general = general_of(state.shared)
    for name, members in (("a", (0, 2, 4)), ("b", (1, 3))):
        alone = Round(2, 3, members)
        asked = dict.fromkeys(members, name)
        got, kept = method.specialised(general, {}, {}, asked, cohort_of(workspace, link, alone), alone)
        assert digest(got[name]) == digest(experts_of(state.shared)[name])
        assert groups_of(kept) == {name: members} and groups_of(state.kept)[name] == members
    assert any(value.any() for name, value in experts_of(state.shared)["a"].items() if "lora_B" in name)


@pytest.mark.parametrize("rule", ["mean", "ffa"])
def test_the_general_expert_stands_still_beneath_and_the_model_is_as_it_was(
    rule: str, tiny_bert: Path, data: Path
) -> None:
    workspace, link = small.workspace_of(experts(tiny_bert, data, HALVES, aggregate={"rule": rule}))
    method: Any = link.method
    tunable, now = workspace.tunable, Round(2, 3, (0, 1, 2, 3))
    state = method.round(method.start(tunable), cohort_of(workspace, link, now), now)
    general = general_of(state.shared)
    before = (
        tunable.settings,
        sorted(tunable.named),
        sorted(tunable.still),
        tunable.net.peft_config["default"].r,
    )
    given = {**general, **{f"expert/{k}": v for k, v in experts_of(state.shared)["a"].items()}}
    method.verbs["specialise"].work(workspace.client_with(0, {}), given, now)
    assert digest(tunable.read()) == digest(general)
    assert before == (
        tunable.settings,
        sorted(tunable.named),
        sorted(tunable.still),
        tunable.net.peft_config["default"].r,
    )


def silent(verb: str, *clients: int) -> Any:
    """A transport over which some clients do not answer one question."""

    def carry(transport: Transport) -> Transport:
        def ask(asks: Sequence[Ask]) -> Any:
            for one in asks:
                if one.verb == verb and one.client in clients:
                    yield Reply(one.client, failure=ClientFailed("F503", "no answer", "one", "wait"))
                else:
                    yield from transport([one])

        return ask

    return carry


def test_no_expert_is_made_of_fewer_clients_than_it_must_have(tiny_bert: Path, data: Path) -> None:
    workspace, link = small.workspace_of(experts(tiny_bert, data, HALVES, partition__clients=4))
    method: Any = link.method
    start = method.start(workspace.tunable)
    few = Round(2, 3, (0, 1, 2))  # of b, one is a member: it is not asked
    state = method.round(start, cohort_of(workspace, link, few), few)
    assert set(experts_of(state.shared)) == {"a"}
    all_ = Round(3, 3, (0, 1, 2, 3))
    cohort = cohort_of(workspace, link, all_, silent("specialise", 0))
    after = method.round(state, cohort, all_)  # of a, one answered: its sum would be that answer
    assert set(experts_of(after.shared)) == {"a", "b"}
    assert digest(experts_of(after.shared)["a"]) == digest(experts_of(state.shared)["a"])
    nobody = method.round(state, cohort_of(workspace, link, all_, silent("specialise", 0, 1, 2, 3)), all_)
    assert experts_of(nobody.shared).keys() == {"a"}
    assert digest(general_of(nobody.shared)) == digest(general_of(after.shared))


def sites(folder: Path, count: int, change: Callable[[int, str], str] | None = None) -> Path:
    """Rows of so many sites, equally many each. Site n has the rows of label n modulo 3 or, with `change`,
    of all labels, which it calls otherwise."""
    labels, made = sorted(small.WORDS), []
    for number, row in enumerate(small.rows(180)):
        label = labels.index(row["label"])
        site = number // 3 % count if change else label + 3 * (number // 3 % (count // 3))
        name = change(site, row["label"]) if change else row["label"]
        made.append({**row, "label": name, "site": f"site-{site}"})
    path = folder / "sites.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.thorough
def test_clients_of_unlike_rows_are_grouped_and_latecomers_join(tiny_bert: Path, tmp_path: Path) -> None:
    by = {"by": "clusters", "warm_up": 1, "min_clients": 2, "sketch": 256}
    column = {"by": "column", "column": "site", "clients": 9}
    recipe = experts(
        tiny_bert,
        sites(tmp_path, 9),
        by,
        partition=column,
        method__train={"lr": 0.01, "steps": 4, "batch": 8},
    )
    workspace, link = small.workspace_of(recipe)
    method: Any = link.method
    label = [workspace.federation.clients[n].train[0]["label"] for n in range(9)]
    state, first = method.start(workspace.tunable), Round(2, 3, tuple(range(8)))
    state = method.round(state, cohort_of(workspace, link, first), first)
    groups = groups_of(state.kept)
    assert {frozenset(label[n] for n in members) for members in groups.values()} == {
        frozenset({name}) for name in set(label)
    }
    later = Round(3, 3, tuple(range(9)))
    cohort = cohort_of(workspace, link, later, silent("sketch", 8))
    waits = method.round(state, cohort, later)  # without a sketch it has the general expert alone
    assert groups_of(waits.kept) == groups
    asked: list[tuple[str, int]] = []

    def watched(transport: Transport) -> Transport:
        return lambda asks: (asked.extend((one.verb, one.client) for one in asks), transport(asks))[1]

    state = method.round(state, cohort_of(workspace, link, later, watched), later)
    assert [client for verb, client in asked if verb == "sketch"] == [8]
    (mine,) = [members for members in groups_of(state.kept).values() if 8 in members]
    assert {label[n] for n in mine} == {label[8]}


@pytest.mark.thorough
def test_an_expert_learns_what_the_general_one_leaves_over(tiny_bert: Path, tmp_path: Path) -> None:
    """Half of the sites call their rows otherwise: no adapter of all can say both."""
    labels = sorted(small.WORDS)
    path = sites(tmp_path, 6, lambda site, label: labels[(labels.index(label) + site % 2) % 3])
    recipe = experts(
        tiny_bert,
        path,
        HALVES,
        partition={"by": "column", "column": "site", "clients": 6},
        rounds=4,
        method__train={"lr": 0.02, "steps": 8, "batch": 8},
    )
    _, _, events = small.play(recipe, tmp_path)
    last = {
        e.client: e.metrics
        for e in events
        if isinstance(e, ClientDone) and e.round == 4 and "expert_loss" in e.metrics
    }
    general = {
        e.client: e.metrics["loss"]
        for e in events
        if isinstance(e, ClientDone) and e.round == 4 and "loss" in e.metrics
    }
    assert len(last) == 6
    assert np.mean([m["expert_loss"] for m in last.values()]) < 0.7 * np.mean(list(general.values()))


def test_check_says_who_sees_what(tiny_bert: Path, data: Path) -> None:
    said = "\n".join(rows(check(experts(tiny_bert, data, {"by": "clusters", "sketch": 64, "noise": 0.1}))))
    assert "verb 'sketch': sees each client's answer, and uses it singly (64 numbers" in said
    assert (
        "with noise of deviation 0.1" in said
        and "verb 'specialise': sees each client's answer as it passes" in said
    )
    assert "a group has 3 members or more" in said and "from round 3 on" in said
    single = "\n".join(rows(check(experts(tiny_bert, data, {"by": "clients"}))))
    assert (
        "verb 'specialise': sees each client's answer, and uses it singly" in single
        and "'sketch'" not in single
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method__adapter": {"kind": "bias"}}, "kind = 'bias'"),
        ({"method__adapter": {"kind": "lora", "dora": True}}, "dora = true"),
        ({"aggregate": {"rule": "median"}}, "aggregate.rule = 'median'.*ffa, hft, mean, rolora"),
        ({"aggregate": {"rule": "fedsa"}}, "aggregate.rule = 'fedsa'"),
        (
            {"chain": [{"step": "quantize", "bits": 8}], "downlink": {"step": "delta"}},
            "downlink.step = 'delta'",
        ),
        ({"method__train": {"weight_decay": 0.1}}, "weight_decay"),
        ({"method__experts": {"by": "clients", "min_clients": 3}}, "min_clients"),
        (
            {
                "method__experts": HALVES | {"gate": {"rounds": 1, "depth": True}},
                "method__train__checkpointing": True,
            },
            "gate.depth with method.train.checkpointing",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: Any, match: str, tiny_bert: Path, data: Path) -> None:
    with pytest.raises(FedtuneError, match=f"C104.*{match}"):
        small.recipe(tiny_bert, data, **{"method__type": "experts", **changes})
    with pytest.raises(FedtuneError, match="C102"):
        experts(tiny_bert, data, {"by": "clusters", "min_clients": 1})
