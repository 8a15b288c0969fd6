"""Logs that do not grow for ever: of programs, of the gateway and of a worker; whoever reads them along goes
on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from fedtune.deploy import supervisor
from fedtune.deploy.client import Told
from fedtune.deploy.metrics import Refusals
from fedtune.deploy.supervisor import Program
from fedtune.events import Event, Noted
from fedtune.exchange.events import CallRefused
from fedtune.sinks.jsonl import jsonl_sink
from tests.waiting import wait_for

CHATTER = (
    "import sys, time\nfor n in range(100000):\n    print(n, 'x' * 100, flush=True)\n    time.sleep(0.002)\n"
)


def test_a_programs_log_is_begun_anew_and_the_program_writes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOG", 3000)
    program = Program("chatter", [sys.executable, "-c", CHATTER], tmp_path / "chatter.log", dict(os.environ))
    kept = tmp_path / "chatter.log.1"
    try:
        program.look()
        wait_for(lambda: program.look() or kept.exists(), "a log that was put aside")
        first = kept.read_text()
        wait_for(lambda: program.look() or (kept.read_text() != first), "the next")
    finally:
        program.stop()
    assert "\0" not in (tmp_path / "chatter.log").read_text() + kept.read_text()  # no hole where it was cut
    assert program.deaths == 0 and kept.stat().st_size < 1 << 20


def test_events_are_begun_anew_and_read_along(tmp_path: Path) -> None:
    path = tmp_path / "worker.jsonl"
    tell, told = jsonl_sink(path, 2000), Told(path)
    heard: list[str] = []
    for number in range(100):
        tell(Noted(f"line {number}"))
        heard += told.lines()
    assert heard == [f"line {number}" for number in range(100)] and path.stat().st_size < 2200
    assert all(json.loads(line) for line in (tmp_path / "worker.jsonl.1").read_text().splitlines())
    plain = jsonl_sink(tmp_path / "events.jsonl")
    for number in range(100):
        plain(Noted(f"line {number}"))
    assert (
        len((tmp_path / "events.jsonl").read_text().splitlines()) == 100
        and not (tmp_path / "events.jsonl.1").exists()
    )


def test_refusals_that_cost_nothing_to_ask_for_cost_no_disk(tmp_path: Path) -> None:
    told: list[Event] = []
    refusals = Refusals(told.append)
    for second in range(600):
        for peer in ("site-a", "site-b"):
            refusals(CallRefused("Call", peer, "T706", "revoked", at=1e9 + second))
    assert refusals.by_code["T706"] == 1200 and len(told) == 2 * 10
