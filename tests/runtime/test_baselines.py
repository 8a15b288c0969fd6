"""What a run is compared with: each comparison is made once, whatever happens between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, Scored
from fedtune.runtime import folder as folders
from fedtune.runtime.baselines import NOT_SCORED, finished_phase, mean_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.run import run
from tests import small
from tests.marks import mostly_thorough

COMPARED = {"rounds": 1, "evaluate__base": True, "evaluate__local": True, "evaluate__centralised": True}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(folders.create(tmp_path, "", "demo").journal)


def never() -> dict[str, Any]:
    raise AssertionError("done again")


def test_a_finished_phase_is_not_done_again(journal: Journal) -> None:
    found = {"metric": "accuracy", "value": 0.5, "loss": 1.0}
    assert finished_phase(journal, "base", lambda: found, never) == found
    assert finished_phase(journal, "base", never, never) == found
    assert finished_phase(journal, "federated", lambda: found | {"value": 0.75}, never)["value"] == 0.75


def test_a_phase_that_fails_is_null_says_why_and_is_not_tried_again(journal: Journal) -> None:
    told: list[Event] = []

    def broken(error: Exception) -> Any:
        def work() -> dict[str, Any]:
            raise error

        return work

    known = FedtuneError("R408", "a", "b", "c")
    for name, error, said in (
        ("local:1", known, str(known)),
        ("local:2", ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ):
        got = finished_phase(journal, name, broken(error), told.append)
        assert got == NOT_SCORED | {"reason": said} == finished_phase(journal, name, never, never)
    assert [event.text.split(". ")[0] for event in told if isinstance(event, Noted)] == [
        "not scored: local:1",
        "not scored: local:2",
    ]


def test_the_mean_is_over_what_was_scored() -> None:
    assert mean_of([None, 0.25, None, 0.75]) == 0.5 and mean_of([None]) is None and mean_of([0.0]) == 0.0


@pytest.mark.parametrize("number", mostly_thorough([2, 4, 6], [4]))
def test_a_run_that_ends_among_its_comparisons_repeats_none_of_them(
    number: int, tiny_bert: Path, tmp_path: Path
) -> None:
    """Killed while it tells of so many comparisons, in whatever order they end, and taken up again: the one that
    it was telling of is made again, those before it are not, and the result is that of a run that nobody
    disturbed."""
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), **COMPARED)
    _, result, undisturbed = small.play(recipe, tmp_path / "whole")
    every = sorted(event.phase for event in undisturbed if isinstance(event, Scored))
    assert len(every) == len(set(every)) == 3 + recipe.partition.clients
    told: list[str] = []

    def killed(event: Event) -> None:
        if isinstance(event, Scored):
            told.append(event.phase)
            if len(told) == number:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path / "killed", killed)
    folder, second = folders.existing(next((tmp_path / "killed").iterdir())), list[Event]()
    again = run(recipe, folder, second.append)
    scored = [event.phase for event in second if isinstance(event, Scored)]
    assert sorted(told[:-1] + scored) == every
    same = ("base", "local", "federated", "centralised", "state_sha256")
    assert {key: again[key] for key in same} == {key: result[key] for key in same}
