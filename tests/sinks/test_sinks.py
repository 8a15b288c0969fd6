"""Where a recipe sends a run's events, and what does not depend on it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Literal

import pytest

from fedtune.config import parse
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, RoundDone, Scored, Sink
from fedtune.sinks import SINKS, SinkSettings, sink_of
from fedtune.sinks.csv import CSV
from fedtune.sinks.jsonl import JSONLines

EVENTS = (
    Scored("base", 0, "accuracy", 0.25, 1.5),
    RoundDone(1, 4, 1, 100, 200, 0.5, {"loss": 0.75}),
    Noted("nothing in numbers"),
    Scored("federated", 1, "accuracy", 0.5, 1.0),
)


def told(sink: Sink, *events: Event) -> None:
    for event in events:
        sink(event)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_figures_are_a_table_that_goes_on_where_it_was(tmp_path: Path) -> None:
    told(CSV().open(tmp_path), *EVENTS[:2])
    told(CSV().open(tmp_path), *EVENTS[2:])  # a run that was resumed
    rows = list(csv.DictReader(lines(tmp_path / "figures.csv")))
    assert rows[0] == {"round": "0", "name": "base accuracy", "value": "0.25"}
    assert {row["name"]: float(row["value"]) for row in rows if row["round"] == "1"} == {
        "loss": 0.75,
        "members": 4,
        "left out": 1,
        "seconds": 0.5,
        "up bytes": 100,
        "down bytes": 200,
        "federated accuracy": 0.5,
    }
    assert len(rows) == 8


def test_events_are_written_once_more_where_a_recipe_says(tmp_path: Path) -> None:
    tell = sink_of(tmp_path, [JSONLines(path="more.jsonl"), JSONLines(path=str(tmp_path / "far.jsonl"))])
    told(tell, *EVENTS)
    assert lines(tmp_path / "events.jsonl") == lines(tmp_path / "more.jsonl") == lines(tmp_path / "far.jsonl")
    assert [json.loads(line)["event"] for line in lines(tmp_path / "more.jsonl")] == [
        type(event).__name__ for event in EVENTS
    ]


class Broken(SinkSettings):
    sink: Literal["broken"] = "broken"

    def open(self, folder: Path) -> Sink:
        def tell(event: Event) -> None:
            raise ConnectionError("nobody there")

        return tell


def test_a_sink_that_fails_is_told_nothing_more_and_nobody_else_misses_anything(tmp_path: Path) -> None:
    heard: list[Event] = []
    told(sink_of(tmp_path, [Broken(), CSV()], heard.append), *EVENTS)
    noted = [event for event in heard if isinstance(event, Noted) and "'broken' failed" in event.text]
    assert len(noted) == 1 and "ConnectionError: nobody there" in noted[0].text
    assert len(heard) == len(EVENTS) + 1 == len(lines(tmp_path / "events.jsonl"))
    assert len(lines(tmp_path / "figures.csv")) == 9


def test_a_full_disk_under_the_runs_own_events_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(FedtuneError, match="R404"):
        sink_of(tmp_path, [])(EVENTS[0])


def test_a_run_is_the_same_whoever_is_told_and_clients_never_hear_of_it() -> None:
    plain, more = parse({}), parse({"sinks": [{"sink": "csv"}, {"sink": "jsonl", "path": "x"}]})
    assert [type(sink) for sink in more.sinks] == [SINKS["csv"], SINKS["jsonl"]]
    assert plain.fingerprint == more.fingerprint and "sinks" not in json.loads(more.canonical())
    with pytest.raises(FedtuneError, match=r"C101: found unknown key 'sinks.0.url'"):
        parse({"sinks": [{"sink": "csv", "url": "x"}]})
