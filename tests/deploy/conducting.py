"""What the tests of a coordinator's run share."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any


def outcomes(folder: Any) -> dict[tuple[int, int], str]:
    """(round, client) -> outcome."""
    with closing(sqlite3.connect(folder.journal)) as db:
        return {
            (number, client): outcome
            for number, client, outcome in db.execute("SELECT round, client, outcome FROM answers")
        }


def notes(folder: Any) -> list[str]:
    with closing(sqlite3.connect(folder.journal)) as db:
        return [note for (note,) in db.execute("SELECT note FROM answers WHERE note != ''")]
