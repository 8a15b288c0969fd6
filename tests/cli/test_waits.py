"""At a terminal a command says what it is waiting for, and takes it back."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from fedtune import progress
from fedtune.cli import waits
from fedtune.cli.waits import ERASE, waiting
from tests.waiting import wait_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    monkeypatch.setattr(
        waits, "sys", SimpleNamespace(stderr=made)
    )  # pytest sets its own in sys for each test
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return made


def test_a_long_wait_is_said_and_taken_back(terminal: Terminal) -> None:
    with waiting("reading the model", after=0.0):
        wait_for(lambda: "reading the model" in terminal.getvalue(), "the line")
        progress.say("scoring", 1200, 3000)
        progress.say("x" * 60)
    said = terminal.getvalue().split(ERASE)
    assert said == ["", "reading the model", "scoring 1,200 of 3,000", "x" * 39, ""]


def test_a_short_one_and_one_that_nobody_sees_say_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting("reading the model"):
        progress.say("scoring", 1, 2)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with waiting("reading the model", after=0.0):
        progress.say("scoring", 1, 2)
    assert terminal.getvalue() == ""


def test_a_mistake_ends_the_wait(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="wrong"), waiting("reading the model", after=0.0):
        wait_for(lambda: bool(terminal.getvalue()), "the line")
        raise ValueError("wrong")
    assert terminal.getvalue().endswith(ERASE) and progress.EAR.get() is None
    assert waits.PATIENCE == 2.0
