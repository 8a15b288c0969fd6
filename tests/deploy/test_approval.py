"""Who has approved which recipe at a site, as its file says; and four eyes."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.deploy.approval import APPROVED, approve, approved, approvers, work_of


def recipe(letter: str) -> Any:
    return SimpleNamespace(fingerprint=letter * 64)


def test_two_people_approve_and_one_twice_is_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert approvers(home) == {} and approved(home) == frozenset()
    assert approve(home, recipe("a"), "the  first\tof all", "ann") == {"ann"}
    assert approve(home, recipe("a"), "again", "ann") == {"ann"}
    assert approve(home, recipe("b"), "b.toml", "ann") == {"ann"}
    assert approved(home) == {"a" * 64, "b" * 64} and approved(home, 2) == frozenset()
    assert approve(home, recipe("a"), "a.toml", "bob") == {"ann", "bob"}
    assert approved(home, 2) == {"a" * 64}
    lines = (home / APPROVED).read_text().splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"a{64} \d{4}-\d\d-\d\dT\d\d:\d\d the first of all\tann", lines[0])


def test_the_user_is_this_machines(tmp_path: Path) -> None:
    assert approve(tmp_path, recipe("c"), "c.toml") == {pwd.getpwuid(os.getuid()).pw_name}


def test_a_file_that_people_write_by_hand(tmp_path: Path) -> None:
    (tmp_path / APPROVED).write_text(f"{'a' * 64}\n\n{'b' * 64} 2026-01-01T00:00 name carl\n")
    assert approvers(tmp_path)["a" * 64] == {""} and approvers(tmp_path)["b" * 64] == {"carl"}
    assert approved(tmp_path) == {"a" * 64, "b" * 64}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"steps": 5, "batch": 8, "epochs": 2}, "5 steps of 8 rows"),
        ({"steps": 0, "batch": 8, "epochs": 2}, "2 passes over the rows in batches of 8"),
        ({"batch": 8}, "work on batches of 8 rows"),
    ],
)
def test_the_work_of_a_round_in_words(train: dict[str, object], said: str) -> None:
    assert work_of(train) == said
