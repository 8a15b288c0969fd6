"""The ledger: who was charged for what, in an SQLite database that only grows.

A line is written before the question is asked, so that no crash can lose it, and once for each (run, round,
client, draw), so that a round which a crash ended before it counted is charged once, whatever became of the
answers. A round that counted, was undone and is asked again is another draw.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fedtune.privacy.accountant import Spent, by_renyi, counted, spent
from fedtune.privacy.releases import Release

TABLES = """
CREATE TABLE IF NOT EXISTS privacy (id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, round INTEGER NOT NULL,
                                    client INTEGER NOT NULL, draw TEXT NOT NULL, unit TEXT NOT NULL, release TEXT NOT NULL,
                                    UNIQUE (run, round, client, draw, unit)) STRICT;
CREATE TABLE IF NOT EXISTS counted (id INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS privacy_stays BEFORE UPDATE ON privacy BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END;
CREATE TRIGGER IF NOT EXISTS privacy_kept BEFORE DELETE ON privacy BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END;
"""


@dataclass(frozen=True)
class Line:
    """A charge: of which client, in which round of which run, for what; `draw` tells one draw of the same
    noise from another."""

    client: int
    round: int
    release: Release
    run: str = ""
    draw: str = "0"


class Ledger:
    """Of one run in its journal, or of one site over all runs. Transactions are the caller's."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        db.executescript(TABLES)

    def charge(self, lines: Iterable[Line]) -> None:
        """Write lines; one that is there already stays as it is."""
        rows = [
            (line.run, line.round, line.client, line.draw, line.release.unit, line.release.text())
            for line in lines
        ]
        self.db.executemany(
            "INSERT OR IGNORE INTO privacy (run, round, client, draw, unit, release) VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )

    def draw(self, round: int) -> str:
        """The name of a round's next draw: how often it has counted before."""
        found = self.db.execute("SELECT count(*) FROM counted WHERE round = ?", (round,)).fetchone()
        return str(found[0])

    def close(self, round: int) -> None:
        """A round counts: where it is asked again, that is another draw. Nothing where nothing was charged."""
        self.db.execute(
            "INSERT INTO counted (round) SELECT ? WHERE EXISTS (SELECT 1 FROM privacy WHERE round = ?)",
            (round, round),
        )

    def lines(self) -> list[Line]:
        rows = self.db.execute("SELECT client, round, release, run, draw FROM privacy ORDER BY id")
        return [Line(client, round, Release.read(text), run, draw) for client, round, text, run, draw in rows]


def by_unit(lines: Iterable[Line], delta: float) -> dict[str, Spent]:
    """For each unit, the most that was spent of one client: a row is one client's, and rows of different
    clients do not add up. Raises P901."""
    of_client = defaultdict[tuple[str, int], list[Release]](list)
    for line in lines:
        of_client[line.release.unit, line.client].append(line.release)
    most: dict[str, Spent] = {}
    for (unit, _), releases in of_client.items():
        one = spent(releases, delta)
        most[unit] = max(most.get(unit, one), one, key=lambda each: (bool(each.unknown), each.epsilon))
    return most


def by_round(lines: Iterable[Line], delta: float, most: int = 100) -> dict[str, list[tuple[int, float]]]:
    """For each unit, (round, the most that was spent of one client until then), by Renyi divergences, which
    are quick to compute; of more than `most` rounds, as many of them, evenly. Units of which something is
    unbounded or unknown are left out. Raises P901."""
    known = list(lines)
    unfit = {line.release.unit for line in known if not line.release.bounded}
    found: dict[str, list[tuple[int, float]]] = {}
    for unit in sorted({line.release.unit for line in known} - unfit):
        mine = [line for line in known if line.release.unit == unit]
        rounds = sorted({line.round for line in mine})
        step = -(-len(rounds) // most)
        for number in sorted({*rounds[::-step]}):
            of_client = defaultdict[int, list[Release]](list)
            for line in mine:
                if line.round <= number:
                    of_client[line.client].append(line.release)
            histories = {frozenset(counted(releases).items()) for releases in of_client.values()}
            spent_most = max(by_renyi(history, delta) for history in largest(histories))
            found.setdefault(unit, []).append((number, spent_most))
    return found


def largest(histories: Collection[frozenset[tuple[Release, int]]]) -> list[frozenset[tuple[Release, int]]]:
    """Without those that another one contains."""
    counts = [dict(history) for history in histories]

    def inside(one: dict[Release, int], other: dict[Release, int]) -> bool:
        return one != other and all(other.get(release, 0) >= count for release, count in one.items())

    return [frozenset(one.items()) for one in counts if not any(inside(one, other) for other in counts)]
