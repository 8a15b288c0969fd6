"""A ledger only grows, and a crash between the charge, the noise and the commit charges once."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from fedtune.privacy.ledger import Line, by_round, by_unit
from fedtune.privacy.releases import Release
from fedtune.runtime.journal import AnswerRecord, Journal

NOISY = Release("gaussian", "client", 2.0)


def commit(journal: Journal, number: int) -> None:
    journal.commit(number, f"s{number}", "f", 0.1, {}, [AnswerRecord(0, "ok"), AnswerRecord(1, "W607")])


def charge(journal: Journal, number: int, *clients: int) -> None:
    """As a run does it, before it asks anybody."""
    draw = journal.ledger.draw(number)
    journal.charge([Line(client, number, NOISY, draw=draw) for client in clients])


def charged(journal: Journal) -> list[tuple[int, int, str]]:
    return [(line.round, line.client, line.draw) for line in journal.charges()]


def test_a_round_is_charged_once_however_often_it_begins(tmp_path: Path) -> None:
    for _ in range(3):  # a crash each time
        journal = Journal(tmp_path / "journal.db")
        charge(journal, 1, 0, 1)
        journal.close()
    journal = Journal(tmp_path / "journal.db")
    commit(journal, 1)  # client 1's answer was rejected, and stays charged
    assert charged(journal) == [(1, 0, "0"), (1, 1, "0")]
    charge(journal, 2, 1)
    assert charged(journal)[2:] == [(2, 1, "0")]


def test_a_round_that_counted_and_is_asked_again_is_another_draw(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    charge(journal, 1, 0)
    commit(journal, 1)
    journal.db.execute("DELETE FROM rounds")  # somebody undid it
    journal.db.execute("DELETE FROM answers")
    charge(journal, 1, 0)
    charge(journal, 1, 0)
    assert charged(journal) == [(1, 0, "0"), (1, 0, "1")]


def test_nothing_is_taken_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    charge(journal, 1, 0)
    for statement in ("DELETE FROM privacy", "UPDATE privacy SET release = '{}'"):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            journal.db.execute(statement)
    assert charged(journal) == [(1, 0, "0")]


def killed(path: Path) -> None:
    """Charge, draw, and die before the commit."""
    journal = Journal(path)
    charge(journal, 7, 0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_charge_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=killed, args=(path,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert charged(Journal(path)) == [(7, 0, "0"), (7, 1, "0")]


def test_the_most_of_one_client_counts() -> None:
    row = Release("poisson-gaussian", "example", 1.0, 0.1, 10)
    lines = [Line(0, 1, NOISY), Line(0, 2, NOISY), Line(1, 1, NOISY), Line(1, 1, row)]
    found = by_unit(lines, 1e-5)
    assert found["client"] == by_unit(lines[:2], 1e-5)["client"] != by_unit(lines[2:3], 1e-5)["client"]
    assert 0 < found["example"].epsilon < math.inf


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_unknown_of_one_client_is_unknown(order: int) -> None:
    lines = [
        Line(0, 1, NOISY),
        Line(1, 1, Release("magic", "client", 1.0)),
        Line(2, 1, Release("none", "client")),
    ]
    assert by_unit(lines[::order], 1e-5)["client"].unknown == ("magic",)


def test_epsilon_by_round_is_that_of_whom_most_was_charged_until_then() -> None:
    """Members change from round to round; the bound by Renyi divergences, of dp-accounting itself."""
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    members = {1: (0, 1), 2: (1, 2), 3: (0, 2), 4: (1, 2)}
    lines = [Line(client, number, NOISY) for number, who in members.items() for client in who]
    lines += [
        Line(3, 1, Release("none", "example")),
        Line(0, 1, Release("gaussian", "client", 2.0), draw="b"),
    ]
    found = by_round(lines, 1e-5)
    assert set(found) == {"client"} and [number for number, _ in found["client"]] == [1, 2, 3, 4]
    for (_, epsilon), (often, more) in zip(found["client"], [(1, 1), (2, 0), (2, 1), (3, 0)], strict=True):
        own = RdpAccountant()
        own.compose(SelfComposedDpEvent(GaussianDpEvent(NOISY.noise), often))
        if more:
            own.compose(GaussianDpEvent(2.0))
        assert epsilon == pytest.approx(own.get_epsilon(1e-5), rel=1e-9)
    assert [number for number, _ in by_round(lines, 1e-5, most=2)["client"]] == [2, 4]
