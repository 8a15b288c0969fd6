"""Tickets in their order: no older one after a newer one, of so many runs, whatever happens to the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.deploy import ticket_window
from fedtune.deploy.ticket_window import AHEAD, FILE, TicketWindow
from fedtune.errors import FedtuneError
from fedtune.forms import RunName

A, B = RunName("a"), RunName("b")
NOW = 1e9


def test_an_older_ticket_is_not_done_after_a_newer_one(tmp_path: Path) -> None:
    window = TicketWindow(tmp_path)
    window.take(A, 5_000_000, NOW)
    window.take(A, 5_000_000, NOW)  # the same one again
    window.take(B, 1, NOW)  # each run has its own
    for made in (window, TicketWindow(tmp_path)):
        with pytest.raises(FedtuneError, match=r"E809: found a ticket of run 'a' that is 3 s older"):
            made.take(A, 2_000_000, NOW)
    TicketWindow(tmp_path).take(A, 5_000_001, NOW)
    assert json.loads((tmp_path / FILE).read_bytes()) == {"floor": 0, "newest": {"a": 5_000_001, "b": 1}}


def test_a_number_of_the_future_does_not_shut_a_site(tmp_path: Path) -> None:
    window, most = TicketWindow(tmp_path), int((NOW + AHEAD) * 1e6)
    with pytest.raises(FedtuneError, match="E809: found a ticket that was signed 602 s from now"):
        window.take(A, most + 2_000_000, NOW)
    assert not (tmp_path / FILE).exists()
    window.take(A, most, NOW)
    assert window.newest == {"a": most}


def test_runs_of_long_ago_cannot_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_window, "RUNS", 3)
    window = TicketWindow(tmp_path)
    for number in range(5):
        window.take(RunName(f"run-{number}"), 10 + number, NOW)
    assert (window.floor, len(window.newest), min(window.newest.values())) == (11, 3, 12)
    for made in (window, TicketWindow(tmp_path)):
        for run in ("run-0", "new"):
            with pytest.raises(FedtuneError, match="E809"):
                made.take(RunName(run), 10, NOW)
    window.take(RunName("new"), 12, NOW)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"newest": 1, "floor": 1}',
        b'{"newest": {"a": "x"}, "floor": 1}',
        b'{"newest": {"a": 9}}',
    ],
)
def test_a_damaged_file_is_begun_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    window = TicketWindow(tmp_path)
    assert (window.floor, window.newest) == (0, {})
    window.take(A, 1, NOW)
    assert TicketWindow(tmp_path).newest == {"a": 1}
