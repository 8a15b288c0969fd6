"""The journal: what happened, round by round, in SQLite. A round counts once its row is committed, not
before.

The order of a commit is the whole of the crash safety: state file (temporary, fsync, rename), then one
transaction
with the round, its members' outcomes and the link of the hash chain. A crash between the two leaves a state
file
that no row names; the next start removes it and does the round again, with the same seeds and so the same
bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.disk import disk_errors, json_text
from fedtune.errors import FedtuneError
from fedtune.privacy.ledger import Ledger, Line

TABLES = """
CREATE TABLE IF NOT EXISTS facts  (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS rounds (number INTEGER PRIMARY KEY, state_sha256 TEXT NOT NULL, file_sha256 TEXT NOT NULL, link TEXT NOT NULL,
                                   seconds REAL NOT NULL, metrics TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS answers (round INTEGER NOT NULL, client INTEGER NOT NULL, outcome TEXT NOT NULL, weight REAL NOT NULL,
                                   up_bytes INTEGER NOT NULL, down_bytes INTEGER NOT NULL, note TEXT NOT NULL,
                                   memory_sha256 TEXT NOT NULL, PRIMARY KEY (round, client)) STRICT;
CREATE TABLE IF NOT EXISTS stages (round INTEGER NOT NULL, verb TEXT NOT NULL, attempt INTEGER NOT NULL, stage TEXT NOT NULL,
                                   members TEXT NOT NULL, PRIMARY KEY (round, verb, attempt, stage)) STRICT;
CREATE TABLE IF NOT EXISTS phases (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class AnswerRecord:
    """What became of one member's answer in one round."""

    client: int
    outcome: str  # "ok", or the error's code
    weight: float = 0.0
    up_bytes: int = 0  # the message on the wire, header included
    down_bytes: int = 0
    note: str = ""
    client_state_sha256: str = ""  # after it; "" where that is empty, or kept elsewhere

    def with_bytes(self, other: AnswerRecord) -> AnswerRecord:
        """This outcome with the bytes of another one."""
        return replace(self, up_bytes=other.up_bytes, down_bytes=other.down_bytes)


@dataclass(frozen=True)
class StageRecord:
    """Who came through one stage of a masked sum: keys, shares, peers, answers, opening."""

    verb: str
    attempt: int  # 1, or more where the sum was begun anew in its round
    stage: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Committed:
    """A row of `rounds`."""

    number: int
    state_sha256: str
    file_sha256: str
    link: str
    seconds: float
    metrics: dict[str, float]


class Journal:
    """One run's journal.db."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path), sentences(path):
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute(
                "PRAGMA synchronous=FULL"
            )  # WAL's default may lose the last commit at a power cut
            self.db.executescript(TABLES)
            self.ledger = Ledger(self.db)

    def close(self) -> None:
        self.db.close()

    def facts(self) -> dict[str, str]:
        """What was written once: fingerprints of recipe, base model and data, and versions."""
        return dict(self._read("SELECT key, value FROM facts"))

    def remember(self, facts: Mapping[str, str]) -> None:
        with self._transaction():
            self.db.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", facts.items())

    def rounds(self) -> list[Committed]:
        rows = self._read(
            "SELECT number, state_sha256, file_sha256, link, seconds, metrics FROM rounds ORDER BY number"
        )
        return [
            Committed(n, state, file, link, seconds, json.loads(metrics))
            for n, state, file, link, seconds, metrics in rows
        ]

    def answers(self) -> list[tuple[int, AnswerRecord]]:
        rows = self._read(
            "SELECT round, client, outcome, weight, up_bytes, down_bytes, note, memory_sha256 FROM answers "
            "ORDER BY round, client"
        )
        return [(number, AnswerRecord(*rest)) for number, *rest in rows]

    def stages(self) -> list[tuple[int, StageRecord]]:
        """Who came through the stages of masked sums, by round."""
        rows = self._read("SELECT round, verb, attempt, stage, members FROM stages ORDER BY rowid")
        return [
            (number, StageRecord(verb, attempt, stage, tuple(json.loads(members))))
            for number, verb, attempt, stage, members in rows
        ]

    def commit(
        self,
        number: int,
        state_sha256: str,
        file_sha256: str,
        seconds: float,
        metrics: Mapping[str, float],
        answers: Iterable[AnswerRecord],
        stages: Iterable[StageRecord] = (),
    ) -> None:
        """Make a round count."""
        with self._transaction():
            before = self.db.execute("SELECT link FROM rounds ORDER BY number DESC LIMIT 1").fetchone()
            link = chain(before[0] if before else "", number, state_sha256)
            self.db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?)",
                (number, state_sha256, file_sha256, link, seconds, json_text(metrics)),
            )
            rows = [(number, *astuple(answer)) for answer in answers]  # fields stand in the order of columns
            self.db.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self.db.executemany(
                "INSERT INTO stages VALUES (?, ?, ?, ?, ?)",
                [(number, s.verb, s.attempt, s.stage, json_text(s.members)) for s in stages],
            )
            self.ledger.close(number)

    def charge(self, lines: Iterable[Line]) -> None:
        """Write down what a round will show of each client, before it is asked; once, however often the round
        begins."""
        with self._transaction():
            self.ledger.charge(lines)

    def charges(self) -> list[Line]:
        """What was charged so far, in order."""
        with sentences(self.path):
            return self.ledger.lines()

    def phase(self, name: str) -> dict[str, Any] | None:
        """The result of a finished phase (base, local, centralised), so that a resumed run need not repeat
        it."""
        rows = self._read("SELECT value FROM phases WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    def phases(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The results of all phases whose name begins so."""
        rows = self._read("SELECT name, value FROM phases")
        return {name: json.loads(value) for name, value in rows if name.startswith(prefix)}

    def finish(self, name: str, value: Mapping[str, Any]) -> None:
        with self._transaction():
            self.db.execute("INSERT OR REPLACE INTO phases VALUES (?, ?)", (name, json_text(value)))

    def extend(self, recipe: str, forget: Iterable[str] = ()) -> None:
        """Go on with a recipe of more rounds: what was scored and compared at the end is open again, and the
        phases to forget."""
        with self._transaction():
            self.db.execute("INSERT OR REPLACE INTO facts VALUES ('recipe', ?)", (recipe,))
            self.db.execute(
                "DELETE FROM phases WHERE name NOT IN ('base', 'clock') AND name NOT LIKE 'round:%' "
                "AND name NOT LIKE 'canary:%' AND name NOT LIKE 'quarantine:%' AND name NOT LIKE 'absent:%' AND name NOT LIKE 'influence:%'"
            )
            for name in forget:
                self.db.execute("DELETE FROM phases WHERE name = ?", (name,))

    def check(self) -> None:
        """Walk the hash chain. Raises R403 where a row was changed or lost."""
        link = ""
        for expected, row in enumerate(self.rounds(), 1):
            link = chain(link, row.number, row.state_sha256)
            if row.number != expected or row.link != link:
                raise FedtuneError(
                    "R403",
                    f"a journal whose round {row.number} does not follow from the one before",
                    "an unbroken hash chain",
                    f"restore '{self.path}' from a backup, or start a new run",
                )

    def _read(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        """All rows of a query; a damaged page is a sentence."""
        with sentences(self.path):
            return self.db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """BEGIN IMMEDIATE ... COMMIT; an exception rolls back."""
        with sentences(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with contextlib.suppress(
                    sqlite3.Error
                ):  # a full disk has rolled back by itself; the first error is the one to tell
                    self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")


@contextlib.contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        why = "no space left on the disk" if "full" in str(error) else str(error)
        raise FedtuneError(
            "R404",
            sentence=f"cannot write the journal '{path}' ({why})",
            do="free space or correct the rights, then: fedtune resume",
        ) from error
    except sqlite3.DatabaseError as error:
        raise FedtuneError(
            "R403",
            f"a damaged journal at '{path}' ({error})",
            "an SQLite database",
            "restore it from a backup, or start a new run",
        ) from error


def chain(before: str, number: int, state_sha256: str) -> str:
    """The next link: SHA-256 of the link before, the round and its state."""
    return hashlib.sha256(f"{before}|{number}|{state_sha256}".encode()).hexdigest()
