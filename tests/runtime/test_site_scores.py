"""Where the coordinator has no rows, sites score what they hold out; the figure is that of all their rows
together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.data import load
from fedtune.errors import Refused
from fedtune.events import Noted
from fedtune.methods.fedpeft import FedPEFT
from fedtune.runtime.client_half import respond
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.folder import create
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link
from fedtune.runtime.run import run
from fedtune.runtime.site_scores import SCORE, asked, score_task
from fedtune.schema import Schema
from fedtune.transforms.base import Chain
from fedtune.types import Round, State
from fedtune.wire import EVERYONE, encode_state
from tests import small

SHARE = {"data__client_test_share": 0.3, "data__test_share": 0.2}


def at_sites(recipe: Recipe, root: Path) -> tuple[dict[str, Any], list[str]]:
    """A run of clients whose coordinator holds nothing to score on: its result, and what it noted."""
    known = load(recipe.data, recipe.partition, recipe.seed)
    folder, notes = create(root, "", "sites"), list[str]()
    folder.begin(recipe)
    result = run(
        recipe,
        folder,
        lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
        None,
        replace(known, test=[]),
    )
    return result, notes


@pytest.mark.parametrize(
    "method", [{}, {"method": {"type": "fedkseed", "steps": 3}}], ids=["fedpeft", "fedkseed"]
)
def test_the_sites_score_is_the_mean_over_all_rows_that_they_hold_out(
    method: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    data = small.write_rows(tmp_path)
    recipe = small.recipe(tiny_bert, data, **SHARE, **method)
    found, _ = at_sites(recipe, tmp_path)
    _, whole, _ = small.play(
        small.recipe(tiny_bert, data, **SHARE, **method, evaluate__clients=True), tmp_path
    )
    own = whole["phases"]["clients_metric"].values()
    rows = sum(one["count"] for one in own)
    assert found["state_sha256"] == whole["state_sha256"] and rows > 20
    assert found["metric"] == "accuracy" and found["federated"] == pytest.approx(
        sum(one["metric"] * one["count"] for one in own) / rows, abs=1e-9
    )
    assert found["phases"]["loss"]["federated"] == pytest.approx(
        sum(one["loss"] * one["count"] for one in own) / rows, abs=1e-6
    )


def test_clients_that_hold_nothing_out_leave_the_run_unscored_with_a_note(
    tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), data__client_test_share=0.0)
    found, notes = at_sites(recipe, tmp_path)
    assert found["metric"] == "" and found["federated"] is None and found["rounds"] == 3
    assert any("not scored at the sites" in note and "D202" in note for note in notes)


class Tuning(FedPEFT):
    """A method without a verb called `train`."""

    @property
    def verbs(self) -> Any:
        return {"tune": super().verbs["train"]}

    def round(self, state: State, cohort: Any, now: Round) -> State:
        return State(cohort.sum("tune", state.shared).values())


def test_a_method_without_a_verb_called_train_can_be_scored(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), **SHARE)
    workspace, usual = small.workspace_of(recipe)
    method = Tuning(recipe.method, recipe.rounds, recipe.aggregate)
    start, names = usual.method.start(workspace.tunable), workspace.names

    def score_after_a_round(link: Link) -> dict[str, Any]:
        transport = local_transport(link, workspace.client, workspace.done)
        first, last = (
            RoundCohort(link, Round(n, recipe.seed, tuple(names)), transport, lambda event: None, names)
            for n in (1, 2)
        )
        return asked(last, link.method.round(start, first, first.now).shared, workspace.tunable)

    renamed = score_after_a_round(
        Link("run", usual.base, method, Chain([]), more={SCORE: score_task(method, 4, Chain([]), "run")})
    )
    assert (
        renamed
        == score_after_a_round(replace(usual, more={SCORE: score_task(usual.method, 4, usual.chain, "run")}))
        and renamed["loss"] > 0
    )


def test_what_nobody_knows_how_to_answer_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    workspace, link = small.workspace_of(small.recipe(tiny_bert, small.write_rows(tmp_path)))
    now, given = Round(1, 3, (0,)), link.method.start(workspace.tunable).shared
    payload = encode_state(given, link.header("prune", EVERYONE, now, Schema.of(given)))
    with pytest.raises(Refused, match="W604: found the verb 'prune', expected one of train"):
        respond(link, workspace.client_with(0, {}), Ask(0, "prune", now, payload))
    twice = replace(link, more={"train": score_task(link.method, 4, link.chain, "run")})
    with pytest.raises(RuntimeError, match="'train', which is the run's own"):
        respond(twice, workspace.client_with(0, {}), Ask(0, "train", now, payload))
