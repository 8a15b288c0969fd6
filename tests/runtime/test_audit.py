"""The audit log: a line for each event that somebody may be asked about, and what stands behind it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.events import Alarm, Noted, RoundDone, RoundStarted, RunDone, RunStarted, Waiting
from fedtune.runtime.audit import audit_sink, facts_of
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.journal import AnswerRecord, Journal
from fedtune.runtime.quarantine import ABSENT
from tests import small

ROUND = RoundDone(1, 2, 1, 30, 40, 0.5, {"loss": 1.5}, 0.25)
BEGUN = RunStarted("demo", "/runs/demo", 3, 2, 10, 100)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with one round, in which one member is left out and another has come back."""
    folder = create(tmp_path, "", "demo")
    folder.begin(small.recipe(Path("m"), Path("rows.jsonl")))
    journal = Journal(folder.journal)
    journal.remember({"recipe": "r", "base": "b", "data": "d"})
    journal.commit(1, "state", "file", 0.1, {"loss": 1.5}, [AnswerRecord(0, "ok", 3.0)])
    journal.finish(f"{ABSENT}zoe", {"spans": [[1, None]]})
    journal.finish(f"{ABSENT}ada", {"spans": [[1, 2], [3, None]]})
    journal.finish(f"{ABSENT}bob", {"spans": [[1, 2]]})
    journal.close()
    return folder


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.path / "audit.jsonl").read_text().splitlines()]


def test_a_round_is_tied_to_its_state_and_says_who_was_out(folder: RunFolder) -> None:
    journal = Journal(folder.journal)
    link = journal.rounds()[0].link
    journal.close()
    facts = facts_of(ROUND, folder)
    own = {key: value for key, value in ROUND.record().items() if key not in ("event", "at")}
    assert facts == own | {"state_sha256": "state", "link": link, "absent": ["ada", "zoe"]}
    unknown = facts_of(RoundDone(2, 2, 1, 30, 40, 0.5, {}, 0.25), folder)
    assert unknown["absent"] == ["ada", "zoe"] and "link" not in unknown and "state_sha256" not in unknown


def test_a_start_names_recipe_base_and_data(folder: RunFolder) -> None:
    facts = facts_of(BEGUN, folder)
    recipe = small.recipe(Path("m"), Path("rows.jsonl"))
    assert facts["recipe_as_read"] == recipe.fingerprint
    assert {key: facts[key] for key in ("recipe", "base", "data", "versions", "run", "rounds")} == {
        "recipe": "r", "base": "b", "data": "d", "versions": "", "run": "demo", "rounds": 3,
    }  # fmt: skip
    assert "absent" not in facts and "event" not in facts and "at" not in facts


def test_an_end_says_no_more_than_the_state(folder: RunFolder) -> None:
    end = RunDone({"state_sha256": "s", "rounds": 3, "federated": 0.5})
    assert facts_of(end, folder) == {"state_sha256": "s", "rounds": 3}
    assert facts_of(RunDone({}), folder) == {"state_sha256": "", "rounds": 0}


def test_only_what_somebody_may_be_asked_about_is_written(folder: RunFolder) -> None:
    tell = audit_sink(folder)
    noted = Noted("a note", at=1_700_000_000.0)
    for event in (
        BEGUN,
        Waiting("x"),
        RoundStarted(1, ("a",)),
        ROUND,
        noted,
        Alarm(1, "canary", "y"),
        RunDone({}),
    ):
        tell(event)
    written = lines(folder)
    assert [line["what"] for line in written] == ["RunStarted", "RoundDone", "Noted", "Alarm", "RunDone"]
    assert written[2]["when"] == datetime.fromtimestamp(1_700_000_000, UTC).isoformat()
    assert (written[3]["alarm"], written[3]["text"], written[3]["round"]) == ("canary", "y", 1)
    assert written[2]["text"] == "a note" and written[1]["absent"] == ["ada", "zoe"]
