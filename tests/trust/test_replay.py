"""The replay window against a set that forgets nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import Refused
from fedtune.trust.replay import WINDOW, Replays


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=60), st.integers(0, 2**62))
def test_each_count_is_taken_once(counts: list[int], start: int) -> None:
    replays, taken, newest = Replays(sqlite3.connect(":memory:")), set[int](), 0
    for count in (start + count for count in counts):
        fits = count >= 1 and count not in taken and count > newest - WINDOW
        try:
            replays.take("a", count)
            assert fits
        except Refused as error:
            assert not fits and error.code == "W605"
            continue
        taken.add(count)
        newest = max(newest, count)
        assert replays.newest("a") == newest


def test_senders_do_not_disturb_each_other_and_a_restart_forgets_nothing(tmp_path: Path) -> None:
    for turn in range(2):
        db = sqlite3.connect(tmp_path / "book.db")
        replays = Replays(db)
        for sender in ("a", "b"):
            if turn:
                with pytest.raises(Refused, match=r"W605.*second time"):
                    replays.take(sender, 5)
            else:
                replays.take(sender, 5)
        replays.take("a", 5 + WINDOW if turn else 4)
        db.commit()
        db.close()
    with pytest.raises(Refused, match=r"W605.*newest"):
        Replays(sqlite3.connect(tmp_path / "book.db")).take("a", 5)


def test_what_it_keeps_does_not_grow(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "book.db")
    replays = Replays(db)
    for count in range(1, 3000):
        replays.take("a", count)
    assert db.execute("SELECT COUNT(*), SUM(LENGTH(taken)) FROM sequences").fetchone() == (1, WINDOW // 8)


def test_a_rolled_back_acceptance_takes_nothing(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "book.db", isolation_level=None)
    replays = Replays(db)
    db.execute("BEGIN")
    replays.take("a", 1)
    db.execute("ROLLBACK")
    replays.take("a", 1)
