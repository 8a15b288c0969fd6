"""Federations on pairs of responses: every loss and both methods that take them, what is scored, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.declared import heaviest
from fedtune.errors import FedtuneError
from fedtune.flower import server_app
from fedtune.runtime.check import check, rows
from fedtune.runtime.data_view import lines, seen
from fedtune.runtime.draft import draft
from fedtune.runtime.folder import create
from fedtune.runtime.predict import predicted
from fedtune.runtime.site_scores import SCORE, score_task
from fedtune.runtime.workspace import judge_of
from fedtune.types import Round
from tests import small, tiny
from tests.deploy import inside as sites
from tests.e2e import test_flower_grid as grid
from tests.marks import mostly_thorough

WALK = {"type": "fedkseed", "estimator": "spsa", "size": 64, "steps": 3, "batch": 4, "lr": 1e-4}
RIGHT = {"animals": "the dog barks", "music": "the piano plays", "weather": "the rain falls"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence, the answer that belongs to its sort, and one that belongs to another."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    sorts = sorted(RIGHT)
    made = []
    for number, row in enumerate(small.rows(80)):
        wrong = sorts[(sorts.index(row["label"]) + 1 + number % 2) % 3]
        made.append(
            {
                "prompt": row["text"],
                "chosen": RIGHT[row["label"]],
                "rejected": RIGHT[wrong],
                "site": row["site"],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def changes(loss: str, **more: Any) -> dict[str, Any]:
    method = more.pop("method", None)
    same = {"data__task": "preference", "data__max_length": 48, **more}
    if method:
        return {**same, "method": {**method, "train": {"objective": {"loss": loss}}}}
    return {**same, "method__train__objective": {"loss": loss}}


def play(llama: Path, pairs: Path, root: Path, loss: str, **more: Any) -> dict[str, Any]:
    return small.play(small.recipe(llama, pairs, **changes(loss, **more)), root)[1]


@pytest.mark.parametrize("loss", mostly_thorough(["dpo", "ipo", "orpo", "simpo"], ["dpo"]))
def test_pairs_are_learned(loss: str, llama: Path, pairs: Path, tmp_path: Path) -> None:
    """What separates the pairs is easy; rows that no client trained on come into their order."""
    result = play(
        llama, pairs, tmp_path / "run", loss,
        method__train__steps=6, method__train__batch=8, evaluate__base=True, evaluate__local=True,
    )  # fmt: skip
    assert result["metric"] == "accuracy" and result["left_out"] == 0
    figures, losses = result["figures"]["federated"], result["phases"]["loss"]
    assert result["federated"] == figures["accuracy"] > 0.75
    assert figures["accuracy_low"] < figures["accuracy"] <= figures["accuracy_high"] <= 1
    assert losses["federated"] < losses["base"]
    assert figures["margin"] > result["figures"]["base"]["margin"]
    assert result["local"] is not None
    assert ("likelier_per_token" in figures) == (loss in ("dpo", "ipo"))
    if loss in ("dpo", "ipo"):
        assert result["base"] == 0.5 and result["figures"]["base"]["margin"] == 0


@pytest.mark.parametrize(
    ("loss", "method"),
    [
        ("orpo", WALK),
        pytest.param("simpo", {**WALK, "estimator": "fzoo", "group": 3}, marks=pytest.mark.thorough),
        pytest.param(
            "dpo",
            {**WALK, "space": "adapter", "adapter": {"kind": "lora", "rank": 2}},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_walkers_need_losses_only(
    loss: str, method: dict[str, Any], llama: Path, pairs: Path, tmp_path: Path
) -> None:
    runs = [play(llama, pairs, tmp_path / name, loss, method=method, rounds=2) for name in "ab"]
    assert runs[0]["state_sha256"] == runs[1]["state_sha256"] and runs[0]["left_out"] == 0
    other = play(llama, pairs, tmp_path / "other", loss, method=method, rounds=2, seed=4)
    assert other["state_sha256"] != runs[0]["state_sha256"]


def test_experts_take_pairs(llama: Path, pairs: Path, tmp_path: Path) -> None:
    experts = {"by": "clusters", "warm_up": 1, "min_clients": 2, "sketch": 64}
    result = play(llama, pairs, tmp_path / "run", "dpo", method__type="experts", method__experts=experts)
    assert result["left_out"] == 0 and result["metric"] == "accuracy"


def test_rules_that_carry_keep_the_base_as_reference(llama: Path, pairs: Path, tmp_path: Path) -> None:
    """What FLoRA carries is a part of the adapter: switched off, the base of the run remains."""
    result = play(
        llama, pairs, tmp_path / "run", "dpo",
        rounds=2, aggregate={"rule": "flora", "extra": 4}, evaluate__base=True,
    )  # fmt: skip
    losses = result["phases"]["loss"]
    assert result["base"] == 0.5 and losses["federated"] < losses["base"]


@pytest.mark.thorough
def test_sites_and_flower_end_with_the_same_bytes(llama: Path, pairs: Path, tmp_path: Path) -> None:
    """The task is one more loss: real sites' workers and Flower's messages give the bytes of a local run."""
    made = changes("dpo", partition__clients=3, rounds=2)
    want = small.play(small.recipe(llama, pairs, **made), tmp_path / "local")[1]["state_sha256"]
    with sites.inside(tmp_path, llama, pairs, **made) as run:
        run.conduct(sites.FakeGrid(run.workers()))
        assert run.folder.read_json("result.json")["state_sha256"] == want
    folder = create(tmp_path / "flower", "", "run")
    recipe = small.recipe(llama, pairs, **made)
    server_app.serve(grid.FakeGrid({7: 1, 5: 2, 6: 0}), recipe, folder, lambda event: None)
    assert folder.read_json("result.json")["state_sha256"] == want


def test_sites_score_their_own_pairs(llama: Path, pairs: Path) -> None:
    """A site's answer weighs as many pairs as it has, and never more than it declared."""
    recipe = small.recipe(llama, pairs, **changes("dpo"))
    workspace, link = small.workspace_of(recipe)
    task = score_task(link.method, 8, link.chain, "run")
    workspace.base.judge = judge_of(recipe)
    given = link.method.start(workspace.tunable).shared
    client = workspace.client_with(0, {})
    update = task.work(client, given, Round(1, 3, (0,)))
    held = len(workspace.federation.clients[0].test)
    assert update.weight == held
    assert update.metrics["accuracy"] / held == 0.5
    assert heaviest(recipe, {"rows": 20, "bytes": 4000}, SCORE) == 20


def test_check_data_and_draft_know_pairs(llama: Path, pairs: Path) -> None:
    recipe = small.recipe(llama, pairs, **changes("dpo"))
    said = "\n".join(rows(check(recipe)))
    assert "preference" in said and "0 keep no response" in said
    shown = "\n".join(lines(seen(recipe)))
    assert "prompt = 'prompt', chosen = 'chosen', rejected = 'rejected'" in shown
    assert "» rather than «" in shown
    found = draft(str(pairs), model=str(llama))
    assert found.guess.task == "preference" and found.clients == 4
    assert found.tree["method"]["train"]["objective"]["loss"] == "dpo"


def test_the_model_answers_prompts(llama: Path, pairs: Path, tmp_path: Path) -> None:
    folder, _, _ = small.play(small.recipe(llama, pairs, rounds=1, **changes("orpo")), tmp_path)
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "the dog"}\n')
    (row,) = predicted(folder.path, str(asked), tokens=3)
    assert row["prompt"] == "the dog" and isinstance(row["prediction"], str)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method__train__objective": {"loss": "cross-entropy"}}, "C104.*'cross-entropy'.*dpo, ipo, orpo or simpo"),
        ({"data__task": "instruct"}, "'dpo' with data.task = 'instruct'"),
        ({"method__adapter": {"kind": "full"}}, "can be switched off"),
        ({"method__start_from": "elsewhere"}, "C104.*start_from.*reference"),
        ({"method__train__together": 2}, "together = 2 with data.task = 'preference'"),
        ({"method__train__private": {"max_grad_norm": 1.0}}, "private"),
        ({"method__train__inputs": [{"input": "neftune"}]}, "neftune"),
        ({"method__train__uds": {"keep": 0.5}}, "uds"),
        ({"select": [{"by": "pvi", "drop": 0.1}]}, "pvi"),
        ({"metrics": [{"metric": "rouge-l"}]}, "rouge-l"),
        ({"data__prompt": "", "data__template": "Q: {prompt}"}, "data.prompt = ''"),
        ({"data__messages": "messages"}, "data.messages"),
        ({"method": {"type": "sfprompt", "tail": 1}}, "'preference' with a split model"),
        ({"method": {"type": "offsite", "train": {"objective": {"loss": "dpo"}}}}, "'preference' with.*offsite"),
        ({"method": {**WALK, "train": {"objective": {"loss": "dpo"}}}}, "can be switched off"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_means_nothing_is_refused(
    more: dict[str, Any], said: str, llama: Path, pairs: Path, tmp_path: Path
) -> None:
    made = {**changes("dpo"), **more}
    if "method" in more:
        made.pop("method__train__objective", None)
    with pytest.raises(FedtuneError, match=said):
        small.recipe(llama, pairs, **made)
