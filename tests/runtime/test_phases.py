"""Where a run's time goes, and that it is counted over crashes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.runtime import phases
from fedtune.runtime.phases import CLIENTS, LOADING, add, by_phase, spent
from fedtune.runtime.run import Run


def test_the_time_of_a_block_is_added_also_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = dict[str, float](), iter([10.0, 13.0, 20.0, 24.0, 99.0])
    monkeypatch.setattr(phases, "time", SimpleNamespace(time=lambda: next(now)))
    with spent(clock, CLIENTS):
        pass
    with pytest.raises(KeyError), spent(clock, CLIENTS):
        raise KeyError
    with spent(clock, LOADING, since=90.0):
        pass
    assert clock == {"phase: clients": 7.0, "phase: loading data and model": 9.0}
    add(clock, CLIENTS, 1.0)
    assert by_phase(clock | {"seconds": 20.0}) == {
        "loading data and model": 9.0, "clients": 8.0, "other": 3.0,
    }  # fmt: skip
    assert list(by_phase(clock | {"seconds": 20.0})) == ["loading data and model", "clients", "other"]
    assert by_phase({"seconds": 1.0, "phase: clients": 2.0})["other"] == 0.0


def test_the_first_round_stops_one_clock_and_each_round_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run that was killed had taken counts, and the first round is timed once."""
    kept: list[tuple[str, Any]] = []
    work: Any = SimpleNamespace(
        clock={"seconds": 5.0, "since": 100.0},
        journal=SimpleNamespace(finish=lambda name, value: kept.append((name, dict(value)))),
    )
    for now in (103.0, 110.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        Run.tick(work)
    assert kept == [
        ("clock", {"seconds": 8.0, "first_round_seconds": 8.0}),
        ("clock", {"seconds": 15.0, "first_round_seconds": 8.0}),
    ]
    assert work.clock["since"] == 110.0
