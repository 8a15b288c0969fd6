"""A site's policy, line by line: a coordinator tries, and the site's own rules hold."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune import config
from fedtune.cli import main
from fedtune.deploy import watchdog
from fedtune.deploy.approval import approve, approved, approvers
from fedtune.deploy.policy import Policy
from fedtune.deploy.site_books import LEDGER, Sent, note_sent
from fedtune.events import Noted
from tests import small
from tests.deploy.inside import SITES
from tests.hostile.coordinator import Taken, taken

HERE = datetime.now().hour
NOISE = {"step": "private", "clip": 1.0, "noise_multiplier": 4.0, "place": "client"}
ROWS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "sample_rate": 0.1}


@pytest.fixture(scope="module")
def hostile(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("taken"), tiny_bert) as made:
        yield made


# line -> policy, changes of the recipe, of the ticket, what the site says
LINES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "coordinators": ('coordinators = ["0123456789abcdef"]', {}, {}, "a coordinator with key"),
    "approved_only": ("approved_only = true", {}, {}, "which nobody here has approved"),
    "recipes": (f'recipes = ["{"0" * 64}"]', {}, {}, "which nobody here has approved"),
    "methods": ('methods = ["fedkseed"]', {}, {}, "method 'fedpeft'"),
    "adapters": (
        'adapters = ["lora"]',
        {"method__adapter": {"kind": "full"}},
        {},
        "an adapter of kind 'full'",
    ),
    "models": ('models = ["org/other"]', {}, {}, "base model"),
    "require": ('require = ["sign"]', {}, {}, "a message chain without 'sign'"),
    "sums_only": ("sums_only = true", {}, {}, "'train' without a mask"),
    "sums_only of scores": (
        "sums_only = true",
        {},
        {"verb": "score"},
        "'score' without a mask",
    ),
    "max_epsilon": ("max_epsilon = 1000.0", {}, {}, "epsilon unbounded"),
    "max_epsilon by the coordinator's word": (
        "max_epsilon = 1000.0",
        {"chain": [NOISE | {"place": "coordinator"}], "method__weight": "equal"},
        {},
        "epsilon unbounded",
    ),
    "max_epsilon by a recipe that says how many rows": (
        "max_epsilon = 1000.0",
        {"chain": [NOISE]},
        {},
        "epsilon unbounded",
    ),
    "max_epsilon with sums beside private training": (
        "max_epsilon = 1000.0",
        {"method__train__private": ROWS, "method__head_start": "lda"},
        {},
        "epsilon unbounded",
    ),
    "max_epsilon of scores": ("max_epsilon = 1000.0", {}, {"verb": "score"}, "epsilon unbounded"),
    "delta": (
        "max_epsilon = 2.2\ndelta = 1e-9",
        {"chain": [NOISE], "method__weight": "equal"},
        {},
        "at delta 1e-09 of a row here, over 1 answers",
    ),
    "min_class_rows": (
        "min_class_rows = 100",
        {"method__head_start": "lda"},
        {"verb": "features"},
        "rows of a class",
    ),
    "verbs": ('verbs = ["importance"]', {}, {}, "the verb 'train'"),
    "scores": ("scores = false", {}, {"verb": "score"}, "a score of rows"),
    "min_rows": ("min_rows = 1000", {}, {}, "rows that train"),
    "min_rows by default": ("", {"data__limit": 1, "data__client_test_share": 0.0}, {}, "1 rows that train"),
    "min_rows by a share": ("", {"data__client_test_share": 0.99}, {}, "1 rows that train"),
    "min_examples by default": (
        "",
        {"method__train__steps": 1, "method__train__batch": 1},
        {},
        "an update of 1 examples",
    ),
    "min_examples": ("min_examples = 9", {}, {}, "an update of 8 examples"),
    "min_steps": ("min_steps = 3", {}, {}, "a recipe with steps = 2"),
    "min_batch": ("min_batch = 5", {}, {}, "a recipe with batch = 4"),
    "approvals": ("approved_only = true\napprovals = 2", {}, {}, "which nobody here has approved"),
    "min_members": ("min_members = 3", {}, {}, "a round of 1 members"),
    "max_rounds": ("max_rounds = 10", {"rounds": 11}, {}, "a run of 11 rounds"),
    "answers_a_day": ("answers_a_day = 2", {}, {}, "one more than 2 answers"),
    "bytes_a_day": ("bytes_a_day = 1_048_600", {}, {}, "bytes in 24 hours"),
    "update_bytes": ("update_bytes = 1000", {}, {}, "updates of up to 1048576 bytes"),
    "hours": (f'hours = "{(HERE + 2) % 24:02}-{(HERE + 3) % 24:02}"', {}, {}, "expected work from"),
}


@pytest.mark.parametrize("line", sorted(LINES))
def test_a_line_holds(line: str, hostile: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, changes, about, words = LINES[line]
    (tmp_path / "policy.toml").write_text(text + "\n")
    worker = hostile.worker(policy=str(tmp_path / "policy.toml"))
    (worker.home / LEDGER).unlink(missing_ok=True)
    if line.endswith("a_day"):
        for ago in (10.0, 20.0, 3 * 86400.0):
            note_sent(worker.home, Sent(time.time() - ago, 50))
    trained: list[Any] = []
    monkeypatch.setattr("fedtune.deploy.worker.respond", lambda *args: trained.append(args))
    base = "" if line.startswith(("min_rows", "scores")) else "b" * 64
    if line.startswith(("min_rows", "min_class")):  # as the coordinator would know it
        worker.workspace(read(recipe := hostile.recipe(**changes)), *workspace_of(worker, recipe))
        base = worker.built[2].base  # type: ignore[index]
    said = hostile.asks(worker, hostile.recipe(**changes), base=base, **about)
    here = [event.text for event in hostile.made.told["site-a"] if isinstance(event, Noted)]
    assert said["code"] == "F507" and words in here[-1], (said, here[-1])
    assert not trained
    (worker.home / LEDGER).unlink(missing_ok=True)


def read(tree: dict[str, Any]) -> config.Recipe:
    return config.Recipe.model_validate_json(json.dumps(tree))


def workspace_of(worker: Any, recipe: Any) -> tuple[Any, Any]:
    from fedtune.deploy.sites import Details

    return worker.own(read(recipe)), Details(json.dumps(recipe), 0, 1, (0,), 0, True, {})


def test_every_line_of_a_policy_is_tried() -> None:
    # below: of work that is under way; tests/deploy/test_site_privacy.py
    elsewhere = {"minutes", "max_norm", "noise"}
    assert {name.split()[0] for name in LINES} | elsewhere == set(Policy.model_fields)


def test_an_answer_takes_no_longer_than_the_site_allows(
    hostile: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe of a billion steps: whoever looks after the worker sees that its time is over."""
    (tmp_path / "policy.toml").write_text("minutes = 30\n")
    worker = hostile.worker(policy=str(tmp_path / "policy.toml"))
    seen: list[str] = []

    def fetch(about: Any) -> Any:
        attempt = worker.home / watchdog.ATTEMPT
        for ago in (1700.0, 1900.0):
            os.utime(attempt, (time.time() - ago, time.time() - ago))
            seen.append(watchdog.overdue(worker.home))
        raise KeyboardInterrupt  # as if it had been killed

    monkeypatch.setattr(worker.exchange, "fetch", fetch)
    worker.workspace(read(recipe := hostile.recipe()), *workspace_of(worker, recipe))
    base = worker.built[2].base  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        hostile.asks(worker, recipe, base=base)
    assert seen[0] == "" and "no progress in 1900 s" in seen[1]
    monkeypatch.undo()
    assert (
        hostile.asks(hostile.worker(policy=str(tmp_path / "policy.toml")), recipe, base=base)["code"]
        == "M311"
    )
    (worker.home / watchdog.REFUSED).unlink()


def test_four_eyes_are_two_people(tmp_path: Path, hostile: Taken) -> None:
    recipe = read(hostile.recipe())
    for _ in range(3):
        approve(tmp_path, recipe, "note", "anna")
    assert approved(tmp_path) == {recipe.fingerprint} and approved(tmp_path, 2) == frozenset()
    assert approve(tmp_path, recipe, "note\tbert x", "carla") == {"anna", "carla"}
    assert approved(tmp_path, 2) == {recipe.fingerprint} and approved(tmp_path, 3) == frozenset()
    other = recipe.model_copy(update={"rounds": 99})
    approve(tmp_path, other, f"{recipe.fingerprint} later", "dora")  # a name that looks like a hash is none
    assert approved(tmp_path, 3) == frozenset() and approvers(tmp_path)[other.fingerprint] == {"dora"}


def test_who_approves_reads_a_page_in_words(
    hostile: Taken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"data__labels": sorted(small.WORDS), "deploy__sites": list(SITES), "model__name": "org/model"}
    tree = small.tree(hostile.model, hostile.rows, chain=[{"step": "sign"}], **named)
    (tmp_path / "recipe.toml").write_text(toml(tree))
    assert main(["approve", str(tmp_path / "recipe.toml"), "--home", str(tmp_path / "home"), "--show"]) == 0
    page = capsys.readouterr().out
    for word in (
        "org/model",
        "lora",
        "3; in each, 2 steps of 4 rows",
        "sign",
        "text 'text'",
        "label 'label'",
        "site-a",
    ):
        assert word in page, word
    assert not (tmp_path / "home").exists()


def test_what_a_policy_names_may_be_done(
    hostile: Taken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same ticket, with everything named: it fails for its base model only, which this coordinator made
    up."""
    recipe = hostile.recipe(chain=[{"step": "sign", "error_feedback": False}])
    worker = hostile.worker()
    fingerprint = read(recipe).fingerprint
    key = hostile.identity.peer.key
    (tmp_path / "policy.toml").write_text(
        f'coordinators = ["{key[:16]}"]\nrecipes = ["{fingerprint}"]\nmethods = ["fedpeft"]\nadapters = '
        '["lora"]\nrequire = ["sign"]\nverbs = ["train"]\n'
        f'models = ["{hostile.model}"]\nmin_rows = 50\nmin_examples = 8\nmax_rounds = 3\nanswers_a_day = '
        "1\nbytes_a_day = 2_000_000\nupdate_bytes = 1048576\n"
        'hours = "00-24"\n'
    )
    worker = hostile.worker(policy=str(tmp_path / "policy.toml"))
    assert hostile.asks(worker, recipe)["code"] == "W604"
    (tmp_path / "policy.toml").write_text("approved_only = true\n")
    worker = hostile.worker(policy=str(tmp_path / "policy.toml"))
    plain, named = (
        hostile.recipe(),
        {"data__labels": sorted(small.WORDS), "deploy__sites": list(SITES), "model__name": "org/model"},
    )
    tree = small.tree(hostile.model, hostile.rows, data__path="elsewhere.jsonl", **named)
    assert hostile.asks(worker, plain)["code"] == "F507"
    (tmp_path / "recipe.toml").write_text(toml(tree))
    assert main(["approve", str(tmp_path / "recipe.toml"), "--home", str(worker.home)]) == 0
    assert read(plain).fingerprint in capsys.readouterr().out
    assert hostile.asks(worker, plain)["code"] == "W604" and hostile.asks(worker, recipe)["code"] == "F507"


def toml(tree: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(tree)
