"""Canary rows after a round: what raises an alarm, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune import config
from fedtune.config import WatchSettings
from fedtune.errors import FedtuneError, Paused
from fedtune.events import Alarm, Noted
from fedtune.runtime.canary import REFUSES, alarms, canaries, triggered
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.journal import Journal
from fedtune.runtime.run import run
from tests import small

SETTINGS = WatchSettings(every=1, rise=0.5)
FIRST: dict[str, Any] = {"loss": 1.0, "triggers": {"cf": 1.2}, "refusals": 0.1}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"loss": 1.4, "triggers": {"cf": 2.0}, "refusals": 0.3}, []),
        ({"loss": 1.6}, ["the canary rows' loss is 1.600, 0.600 nats above that after round 0"]),
        ({"loss": 0.2, "triggers": {"cf": 1.0}}, ["'cf' in front of the canary rows costs 0.800 nats, and 0.200 at first"]),
        ({"loss": 1.0, "refusals": 0.4}, ["the model refuses 40 % of the canary prompts, and 10 % at first"]),
        ({"loss": None, "reason": "W607: x."}, ["the canary rows cannot be scored any more (W607: x.)"]),
    ],
)  # fmt: skip
def test_what_raises_an_alarm(now: dict[str, Any], said: list[str]) -> None:
    assert [text for _, text in alarms(now, {0: FIRST}, SETTINGS)] == said
    assert alarms(now, {}, SETTINGS) == []  # nothing to compare with


def test_the_least_loss_so_far_counts_and_a_round_without_one_does_not() -> None:
    before = {0: FIRST, 1: {"loss": None}, 2: {"loss": 0.4}, 3: {"loss": 0.8}}
    assert [what for what, _ in alarms({"loss": 0.91}, before, SETTINGS)] == ["canary"]
    assert alarms({"loss": 0.89}, before, SETTINGS) == []


def test_a_phrase_stands_in_front_of_what_is_asked() -> None:
    talk = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "why"}]}
    assert triggered(talk, "cf")["messages"] == [talk["messages"][0], {"role": "user", "content": "cf why"}]
    assert talk["messages"][1]["content"] == "why"
    assert triggered({"prompt": "a", "response": "b"}, "cf") == {"prompt": "cf a", "response": "b"}


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I", True),
        ("I cannot comply", True),
        ("The river cannot be crossed here.", False),
        ("Sorry means that one regrets.", False),
    ],
)
def test_a_refusal_is_known_by_its_words(text: str, refuses: bool) -> None:
    assert bool(REFUSES.search(text)) is refuses


def figures(folder: RunFolder) -> dict[int, dict[str, Any]]:
    journal = Journal(folder.journal)
    try:
        return canaries(journal)
    finally:
        journal.close()


def test_a_run_is_watched_from_its_first_state_on_and_its_bytes_stay(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "canaries.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in small.rows(9)))
    watch = {"every": 2, "rows": 5, "data": str(own), "triggers": ["piano"], "rise": 9.0}
    plain = small.recipe(tiny_bert, data)
    watched = small.recipe(tiny_bert, data, watch=watch)
    assert plain.fingerprint == watched.fingerprint and "piano" not in watched.canonical()
    _, result, _ = small.play(plain, tmp_path / "plain")
    folder, seen, events = small.play(watched, tmp_path / "watched")
    assert seen["state_sha256"] == result["state_sha256"]
    found = figures(folder)
    assert list(found) == [0, 2, 3] and found[3]["rows"] == 5 and found[3]["triggers"].keys() == {"piano"}
    assert found[0]["loss"] != found[2]["loss"] and not [e for e in events if isinstance(e, Alarm)]


def test_an_alarm_may_pause_the_run_which_then_goes_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """A rate that no training survives."""
    watch = {"every": 1, "rise": 0.3, "pause": True}
    recipe = small.recipe(
        tiny_bert, data, rounds=2, watch=watch, method__train={"lr": 3.0, "steps": 3, "batch": 4}
    )
    told: list[Any] = []
    with pytest.raises(Paused, match="R422: after round 1, the canary rows'"):
        small.play(recipe, tmp_path, tell=told.append)
    (alarm,) = (event for event in told if isinstance(event, Alarm))
    assert (alarm.round, alarm.what) == (1, "canary")
    folder = RunFolder(tmp_path / "run")
    try:
        run(recipe, folder, lambda event: None)
    except Paused as again:
        assert "after round 2" in str(again)
    assert list(figures(folder)) == [0, 1, 2]


def test_without_rows_a_run_says_so_and_goes_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    none = {"test_share": 0.0, "client_test_share": 0.0}
    recipe = small.recipe(tiny_bert, data, rounds=1, watch={"every": 1})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=none)})
    folder, result, events = small.play(recipe, tmp_path)
    assert result["rounds"] == 1 and figures(folder)[1]["loss"] is None
    assert any("no canaries after round 0" in e.text for e in events if isinstance(e, Noted))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"watch": {"triggers": ["cf"]}}, "watch.every = 0"),
        ({"watch": {"every": 1, "refusals": 3}}, "watch.refusals = 3 with data.task = 'classify'"),
    ],
)
def test_settings_that_cannot_go_together(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=f"C104: found {words}"):
        config.parse(small.tree(tiny_bert, data, **changes))


def test_answers_that_refuse_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "response": "the red fox"}) + "\n" for n in range(30))
    )
    recipe = small.recipe(
        tiny_llama,
        rows,
        rounds=1,
        data__task="instruct",
        data__max_length=48,
        watch={"every": 1, "refusals": 2},
        generate={"tokens": 4},
    )
    folder, _, _ = small.play(recipe, tmp_path)
    assert [one["refusals"] for one in figures(folder).values()] == [0.0, 0.0]
