"""Members that are left out from some round on, while the run goes on; rounds that are taken back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.events import RoundDone
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.quarantine import quarantine
from fedtune.runtime.replay import Record
from fedtune.runtime.rollback import roll_back
from fedtune.runtime.run import run
from tests import small
from tests.marks import mostly_thorough

NOW = datetime.now(UTC)
TWO_WAYS = {"chain": [{"step": "sign", "error_feedback": True}], "downlink": {"step": "delta"}}


def asked(folder: RunFolder) -> dict[int, set[int]]:
    """Who was asked, by round."""
    found: dict[int, set[int]] = {}
    for number, answer in Record.of(folder).answers:
        found.setdefault(number, set()).add(answer.client)
    return found


def nobody(event: Any) -> None:
    pass


@pytest.fixture(scope="module")
def changed(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of five rounds in which client 1 was left out in the third and fourth, said while it went on."""
    root = tmp_path_factory.mktemp("changed")

    def say(event: Any) -> None:
        if isinstance(event, RoundDone) and event.round in (2, 4):
            quarantine(RunFolder(root / "run"), "client-1", NOW, "odd figures", lift=event.round == 4)

    return small.play(small.recipe(tiny_bert, data, rounds=5, **TWO_WAYS), root, tell=say)[0]


def test_a_running_coordinator_leaves_a_member_out_from_the_next_round_on(
    changed: RunFolder, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    everybody = {0, 1, 2, 3}
    assert asked(changed) == {1: everybody, 2: everybody, 3: {0, 2, 3}, 4: {0, 2, 3}, 5: everybody}
    plain, _, _ = small.play(small.recipe(tiny_bert, data, rounds=3, **TWO_WAYS), tmp_path)
    ours, theirs = Record.of(changed).rounds, Record.of(plain).rounds
    assert ours[1].state_sha256 == theirs[1].state_sha256
    assert ours[2].state_sha256 != theirs[2].state_sha256


def test_a_run_that_was_killed_leaves_the_same_members_out(
    changed: RunFolder, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    class Killed(Exception): ...

    folder = RunFolder(tmp_path / "run")

    def kill(event: Any) -> None:
        if isinstance(event, RoundDone) and event.round == 2:
            quarantine(folder, "client-1", NOW)
        if isinstance(event, RoundDone) and event.round == 3:
            raise Killed

    recipe = small.recipe(tiny_bert, data, rounds=4, **TWO_WAYS)
    with pytest.raises(Killed):
        small.play(recipe, tmp_path, tell=kill)
    run(recipe, folder, nobody)
    assert asked(folder)[4] == {0, 2, 3}
    assert Record.of(folder).rounds[3].state_sha256 == Record.of(changed).rounds[3].state_sha256


def test_a_member_is_forgotten_in_a_run_that_left_others_out(changed: RunFolder, tmp_path: Path) -> None:
    done = fedtune.forget(changed.path, ["client-2"], tmp_path / "new")
    assert asked(RunFolder(done.folder)) == {1: {0, 1, 3}, 2: {0, 1, 3}, 3: {0, 3}, 4: {0, 3}, 5: {0, 1, 3}}


@pytest.mark.parametrize("number", mostly_thorough([4, 3, 0], [3]))
def test_a_run_that_is_rolled_back_stands_where_it_stood(
    number: int, changed: RunFolder, tmp_path: Path
) -> None:
    """Its clients remember the last round alone, so that every other is computed again, and compared. Who
    takes part from there on is what was said last: client 1 does, client 3 does not."""
    new = tmp_path / "back"
    assert roll_back(changed, number, new, NOW, ["client-3"]) == number
    if number:
        rounds = [(row.number, row.state_sha256) for row in Record.of(RunFolder(new)).rounds]
        assert rounds == [(row.number, row.state_sha256) for row in Record.of(changed).rounds[:number]]
    run(recipe_of(RunFolder(new)), RunFolder(new), nobody)
    everybody, few = {0, 1, 2, 3}, {0, 2, 3}
    until = dict(list({1: everybody, 2: everybody, 3: few, 4: few}.items())[:number])
    assert asked(RunFolder(new)) == until | {n: {0, 1, 2} for n in range(number + 1, 6)}


def test_of_clients_without_memories_the_last_two_states_are_enough(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, result, _ = small.play(small.recipe(tiny_bert, data), tmp_path)
    assert roll_back(folder, 2, tmp_path / "back", NOW) == 0
    back = RunFolder(tmp_path / "back")
    assert run(recipe_of(back), back, nobody)["state_sha256"] == result["state_sha256"]


def test_the_commands(changed: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(tmp_path / "back")
    assert main(["rollback", str(changed.path), "--to", "4", "--without", "client-0", "--as", new]) == 0
    assert f"4 rounds were computed again; go on with: fedtune resume {new}" in capsys.readouterr().out
    assert main(["quarantine", new]) == 0
    assert capsys.readouterr().out == (
        "client-0: left out from the next round on (rolled back to round 4 of run)\n"
    )
    assert main(["quarantine", new, "client-0", "--lift"]) == 0
    assert main(["quarantine", new, "client-2", "--why", "its loss"]) == 0 and main(["resume", new]) == 0
    capsys.readouterr()
    assert main(["quarantine", new]) == 0
    assert capsys.readouterr().out == "client-2: left out from round 5 on (its loss)\n"
    assert asked(RunFolder(Path(new)))[5] == {0, 1, 3}


def test_what_cannot_be_left_out_or_taken_back_is_refused(changed: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="C103: found client 'nobody', expected one of client-0"):
        quarantine(changed, "nobody", NOW)
    with pytest.raises(FedtuneError, match="C103: found --lift for 'client-0'"):
        quarantine(changed, "client-0", NOW, lift=True)
    with pytest.raises(FedtuneError, match="C103: found round 5, expected 0 to 4"):
        roll_back(changed, 5, tmp_path / "new", NOW)
    with pytest.raises(FedtuneError, match="C103: found client 'nobody'"):
        roll_back(changed, 4, tmp_path / "new", NOW, ["nobody"])
    (tmp_path / "taken").mkdir()
    with pytest.raises(FedtuneError, match="R401"):
        roll_back(changed, 4, tmp_path / "taken", NOW)
