"""What a person at a terminal sees while a run goes on, and that it does not hold up the run."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedtune import forks, progress
from fedtune.cli.watching import watch
from fedtune.events import (
    ClientDone,
    Event,
    Noted,
    Progress,
    RoundDone,
    RoundStarted,
    RunDone,
    RunStarted,
    Waiting,
)
from fedtune.sinks import sink_of
from fedtune.sinks.live import Live, clients_in_words, figures_in_words, now_in_words
from fedtune.sinks.standing import Standing
from tests import small
from tests.forked import run_fedtune
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "fedtune", "simulate"]


def standing(*events: Event) -> Standing:
    made = Standing()
    for event in events:
        made.told(event)
    return made


def client(name: str, seconds: float) -> ClientDone:
    return ClientDone(2, 0, name, 1.0, 1024, 2048, {"loss": 1.0}, seconds)


GOING_ON = (
    RunStarted("r", "runs/r", 4, 5, 10, 100),
    RoundDone(1, 4, 0, 10, 10, 8.0, {"loss": 2.0}),
    RoundStarted(2, ("a", "b", "c", "d"), at=100.0),
    client("a", 1.0),
    client("b", 1.0),
    client("c", 9.0),
    Progress("training", 3, 20, 1.5),
)


def test_where_a_run_stands() -> None:
    now = standing(*GOING_ON)
    assert (now.round, now.committed, now.answered, now.waited_for) == (2, 1, 3, ["d"])
    assert now.slow() == ("c", 9.0, 1.0)
    assert now.seconds_left(now=103.0) == 8.0 * 3 - 3
    assert clients_in_words(now).startswith("3 of 4 clients")
    assert figures_in_words(now) == "loss 2.0000 ▁ · up 3.0 KiB, down 6.0 KiB"
    said = now_in_words(now, now=now.since + 12)
    assert said == (
        "waiting for d · training 3 of 20, loss 1.5000 · for 12 s · slow: c, 9.0 s where others take 1.0 s"
    )
    assert standing(*GOING_ON, RunDone({})).seconds_left() is None


def test_a_wait_says_for_what_and_for_how_long() -> None:
    now = standing(Waiting("loading the model", at=50.0))
    assert now_in_words(now, now=51.0) == "loading the model"
    assert now_in_words(now, now=53.0) == "loading the model · for 3 s"


def test_progress_is_told_seldom_and_written_nowhere(tmp_path: Path) -> None:
    heard: list[Event] = []
    with progress.heard_by(sink_of(tmp_path, [], heard.append), every=60.0):
        for step in range(1000):
            progress.say("training", step, 1000, 0.5)
        progress.say("scoring", 1, 2)
    progress.say("training", 1, 2)  # nobody listens
    assert [(event.what, event.done) for event in heard if isinstance(event, Progress)] == [
        ("training", 0),
        ("scoring", 1),
    ]
    assert not (tmp_path / "events.jsonl").exists()


def test_who_watches_costs_the_work_nothing() -> None:
    def broken(event: Event) -> None:
        raise OSError("no space")

    with progress.heard_by(broken):
        progress.say("training", 1, 2)


class SlowTerminal(io.StringIO):
    """A terminal at which every write takes as long as it is told to."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        time.sleep(self.seconds)
        return super().write(text)

    def isatty(self) -> bool:
        return True


def test_a_run_does_not_wait_for_its_terminal_but_everything_is_shown_in_the_end() -> None:
    terminal = SlowTerminal(0.1)
    console = Console(file=terminal, force_terminal=True, width=100, highlight=False)
    with Live(console) as tell:
        wait_for(lambda: terminal.writes > 2, "a first drawing")
        began = time.perf_counter()
        for number in range(1, 51):
            tell(Noted(f"line {number}"))
            tell(Progress("training", number, 50))
        told = time.perf_counter() - began
    assert told < 50 * 0.1 / 2  # a terminal in the way would have taken two writes a line, 10 s
    lines = re.findall(r"note: line (\d+)", terminal.getvalue())
    assert lines == [str(number) for number in range(1, 51)]


def test_the_display_rests_while_the_process_forks() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Live(console) as tell:
        drawing = threading.active_count()
        with forks.resting():
            assert threading.active_count() == drawing - 1
        assert threading.active_count() == drawing
        tell(Noted("still there"))
    assert "still there" in console.file.getvalue() and not forks.HELPERS  # type: ignore[attr-defined]


def test_a_status_is_looked_at_until_its_run_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    said = [["r: round 1 of 2, about 4 s left", "  up 1 B"], ["r: round 2 of 2, finished", "  up 1 B"]]
    watch(lambda: said.pop(0), every=0.0)
    assert capsys.readouterr().out.splitlines() == [
        "r: round 1 of 2, about 4 s left",
        "  up 1 B",
        "r: round 2 of 2, finished",
    ]


@pytest.fixture
def recipe(tiny_bert: Path, tmp_path: Path) -> Path:
    more = {"evaluate": {"base": True, "local": True, "centralised": False}, "method__train__steps": 30}
    return small.write_recipe(tmp_path / "mine.toml", tiny_bert, small.write_rows(tmp_path), rounds=2, **more)


def at_a_terminal(*arguments: str) -> tuple[int, str]:
    """A command's exit code and everything that it wrote to its terminal."""
    ours, its = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([*COMMAND, *arguments], stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    written = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that nobody has the other end any more
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    return process.wait(), written.decode(errors="replace")


@pytest.mark.thorough
def test_a_tiny_federation_at_a_terminal(recipe: Path, tmp_path: Path) -> None:
    code, said = at_a_terminal(str(recipe), "--runs", str(tmp_path / "runs"))
    assert code == 0, said
    for word in ("round 1 of 2", "of 4 clients", "reading the data and loading the model", "━"):
        assert word in said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor is hidden, and is back
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said)
    assert re.search(r"round   2  4 of 4 clients  loss \d\.\d{4}", plain)
    assert all(
        word in plain for word in ("federated", "local only", str(tmp_path / "runs" / "mine" / "adapter"))
    )


def test_lines_for_programs_and_no_lines_at_all(recipe: Path, tmp_path: Path) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    done = run_fedtune("simulate", str(recipe), *runs, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "Waiting" and events[-1]["event"] == "RunDone"
    kinds = {event["event"] for event in events}
    assert {"RunStarted", "RoundStarted", "ClientDone", "RoundDone", "Scored", "Progress"} <= kinds
    assert all(event["seconds"] > 0 for event in events if event["event"] == "ClientDone")
    result = json.loads((tmp_path / "runs" / "mine" / "result.json").read_text())
    assert events[-1]["result"]["state_sha256"] == result["state_sha256"]
    phases = result["seconds_by_phase"]
    assert phases["clients"] > 0 and abs(sum(phases.values()) - result["seconds"]) < 0.01
    done = run_fedtune("simulate", str(recipe), *runs, "--quiet")
    assert done.returncode == 0 and done.stdout == "" == done.stderr


@pytest.mark.thorough
def test_the_same_in_a_notebook(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    tree = small.tree(tiny_bert, small.write_rows(tmp_path), rounds=2)
    code = (
        f"import fedtune\nwith fedtune.live() as show:\n"
        f"    fedtune.simulate({tree!r}, runs={str(tmp_path / 'runs')!r}, on_event=show)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    (page,) = [one["data"]["text/html"] for one in done.cells[0].outputs if one.output_type == "display_data"]
    assert "round   2  4 of 4 clients" in page and "federated" in page and "<progress" not in page
