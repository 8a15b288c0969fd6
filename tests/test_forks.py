"""Jobs in forks say what the same jobs say here, whatever becomes of the forks, and no fork is left."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from fedtune import forks
from fedtune.forks import Forks


@pytest.fixture(autouse=True)
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own process may have a thread of the test runner's, which holds no lock."""
    monkeypatch.setattr(forks, "can_fork", lambda: True)


def square(number: int) -> list[int]:
    return [number * number, os.getpid()]


def test_every_job_is_done_once_and_elsewhere() -> None:
    work = Forks([partial(square, number) for number in range(20)], 2)
    children = list(work.children)
    found = dict(work.results())
    assert {number: value for number, (value, _) in found.items()} == {n: n * n for n in range(20)}
    assert {pid for _, pid in found.values()} <= set(children) and len(children) == 2
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_what_a_killed_fork_leaves_is_done_here() -> None:
    here = os.getpid()

    def deadly(number: int) -> int:
        if number == 1 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert dict(Forks([partial(deadly, n) for n in range(5)], 2).results()) == {n: n for n in range(5)}


def test_an_error_in_a_fork_is_raised_here() -> None:
    def wrong() -> int:
        raise ValueError("of a job")

    with pytest.raises(ValueError, match="of a job"):
        list(Forks([wrong, partial(square, 2)], 2).results())


def test_leaving_early_ends_the_forks() -> None:
    work = Forks([partial(square, number) for number in range(3)] + [partial(signal.pause)], 2)
    children = list(work.children)
    results = work.results()
    next(results)
    results.close()  # type: ignore[attr-defined]
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_with_another_thread_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "can_fork", lambda: False)
    assert {pid for _, (_, pid) in Forks([partial(square, n) for n in range(3)], 2).results()} == {
        os.getpid()
    }
