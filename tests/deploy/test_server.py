"""The coordinator's supervisor, looking at one run: submitted when nobody works on it, given up when that
never helps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import server
from fedtune.deploy.server import Coordinator, Ended, Running
from fedtune.deploy.supervisor import TRIES, alone
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder


class Flower:
    """Stands for `flwr run`: counts the submissions, and says what it is told to."""

    def __init__(self) -> None:
        self.submissions, self.says = 0, '{"success": true}'

    def run(self, command: Any, **more: Any) -> Any:
        self.submissions += 1
        if self.says == "nothing":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 0, self.says, "")


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    made = Flower()
    monkeypatch.setattr(server.subprocess, "run", made.run)
    monkeypatch.setattr(server, "ABSENT", -1.0)
    monkeypatch.setattr(server, "SUBMITTED", -1.0)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Running:
    (tmp_path / "run").mkdir()
    return Running(RunFolder(tmp_path / "run"))


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path, tmp_path, "127.0.0.1:1", "", lambda event: None)


def tell(run: Running, **event: Any) -> None:
    with (run.folder.path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def test_a_run_that_nobody_works_on_is_submitted_and_one_that_is_held_is_not(
    flower: Flower, run: Running, coordinator: Coordinator
) -> None:
    with run.folder.locked():
        assert not coordinator.look_at(run) and flower.submissions == 0
    assert not coordinator.look_at(run) and flower.submissions == 1
    run.folder.write_json("result.json", {})
    assert coordinator.look_at(run) and flower.submissions == 1


def test_a_run_that_ended_with_a_sentence_is_not_submitted_again(
    flower: Flower, run: Running, coordinator: Coordinator
) -> None:
    run.folder.write_json("failed.json", {"code": "R409", "sentence": "R409: found 2", "exit_code": 75})
    with pytest.raises(Ended) as ended:
        coordinator.look_at(run)
    assert (str(ended.value), ended.value.exit_code, flower.submissions) == ("R409: found 2", 75, 0)


def test_a_run_that_dies_again_and_again_without_a_step_is_given_up(
    flower: Flower, run: Running, coordinator: Coordinator
) -> None:
    """With a step now and then it goes on for ever."""
    for number in range(3 * TRIES):
        tell(run, event="RunStarted")
        if number % (TRIES - 1) == 0:
            tell(run, event="ClientDone")
        coordinator.look_at(run)
    with pytest.raises(
        FedtuneError,
        match=rf"F505: the process of the run ended {TRIES} times without one more answer.*crash.log, then: "
        r"fedtune resume",
    ):
        for _ in range(TRIES + 1):
            tell(run, event="RunStarted")
            coordinator.look_at(run)


@pytest.mark.parametrize(
    ("says", "words"),
    [('{"success": false, "error-message": "no room"}', "no room"), ("nothing", "no answer within 300 s")],
)
def test_a_flower_that_takes_no_runs_is_asked_a_few_times(
    says: str, words: str, flower: Flower, run: Running, coordinator: Coordinator
) -> None:
    flower.says = says
    with pytest.raises(FedtuneError, match=rf"F505: Flower did not accept the run \(.*{words}"):
        for _ in range(2 * TRIES):
            coordinator.submit(run)
    assert flower.submissions == TRIES + 1


def test_events_are_told_once_and_a_line_that_is_half_there_later(run: Running) -> None:
    tell(run, event="RunStarted")
    with (run.folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "Round')
    assert [e["event"] for e in run.events()] == ["RunStarted"] and not list(run.events())
    with (run.folder.path / "events.jsonl").open("a") as file:
        file.write('Done"}\n')
    assert [e["event"] for e in run.events()] == ["RoundDone"]


def test_one_coordinator_a_folder(tmp_path: Path) -> None:
    with (
        alone(tmp_path),
        pytest.raises(FedtuneError, match="F506: another fedtune is working"),
        alone(tmp_path),
    ):
        pass
