"""The exchange's book: which rounds are asked of whom, and what was accepted. SQLite, for several processes
at once.

A row of `accepted` is what an update counts by: one a run, round, verb and client. It is written in one
transaction with the
replay window and the receipt, after the update is on disk; only then does the client get its receipt.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.objects import absent
from fedtune.forms import Sha256
from fedtune.trust import Envelope, Peer, Replays, Signed

TABLES = """
CREATE TABLE IF NOT EXISTS pins     (run TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (run, sha256)) STRICT;
CREATE TABLE IF NOT EXISTS rounds   (run TEXT NOT NULL, round INTEGER NOT NULL, verb TEXT NOT NULL, base TEXT NOT NULL, budget INTEGER NOT NULL,
                                     open INTEGER NOT NULL, PRIMARY KEY (run, round, verb)) STRICT;
CREATE TABLE IF NOT EXISTS asked    (run TEXT NOT NULL, round INTEGER NOT NULL, verb TEXT NOT NULL, client TEXT NOT NULL, given TEXT NOT NULL,
                                     PRIMARY KEY (run, round, verb, client)) STRICT;
CREATE INDEX IF NOT EXISTS asked_client ON asked (client, run);
CREATE TABLE IF NOT EXISTS accepted (row INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, round INTEGER NOT NULL, verb TEXT NOT NULL,
                                     client TEXT NOT NULL, payload TEXT NOT NULL, size INTEGER NOT NULL, envelope BLOB NOT NULL,
                                     signature BLOB NOT NULL, signer TEXT NOT NULL, record BLOB NOT NULL, seal BLOB NOT NULL, sealer TEXT NOT NULL,
                                     released INTEGER NOT NULL, UNIQUE (run, round, verb, client)) STRICT;
CREATE INDEX IF NOT EXISTS accepted_payload ON accepted (payload);
CREATE TABLE IF NOT EXISTS left_out (run TEXT NOT NULL, round INTEGER NOT NULL, verb TEXT NOT NULL, client TEXT NOT NULL, why TEXT NOT NULL,
                                     PRIMARY KEY (run, round, verb, client)) STRICT;
CREATE TABLE IF NOT EXISTS certificates (sha256 TEXT PRIMARY KEY, pem BLOB NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class Asked:
    """What one client may answer."""

    base: str
    given: str
    budget: int
    open: bool


@dataclass(frozen=True)
class Accepted:
    """An update that counts. `row` is its number in the book and in its receipt."""

    row: int
    client: str
    payload: Sha256
    size: int


@dataclass(frozen=True)
class Progress:
    """One verb of one round."""

    run: str
    round: int
    verb: str
    open: bool
    asked: int
    accepted: int
    bytes: int


class RoundLedger:
    """book.db of an exchange. Safe between threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self.sentences():
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute(
                "PRAGMA synchronous=FULL"
            )  # WAL's default may lose the last commit at a power cut
            self.db.executescript(TABLES)
            self.replays = Replays(self.db)

    def close(self) -> None:
        with self._lock:
            self.db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, one writer at a time among all processes. Raises E804, E807."""
        with self._lock, self.sentences():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    @contextlib.contextmanager
    def sentences(self) -> Iterator[None]:
        """Turn what SQLite says into a sentence."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and not str(error).startswith(
                ("file is not", "database disk image")
            ):
                raise FedtuneError(
                    "E804",
                    sentence=f"the coordinator's database cannot be written now ({error})",
                    do="free space on its disk",
                ) from error
            raise FedtuneError(
                "E807",
                sentence=f"the coordinator's database '{self.path.name}' is damaged ({error})",
                do="restore it from a backup",
            ) from error

    def query(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self.sentences():
            return self.db.execute(text, values).fetchall()

    # --- the runtime's half ---

    def pin(self, run: str, sha256: str) -> None:
        with self.transaction():
            self.db.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (run, sha256))

    def open_round(
        self, run: str, round: int, verb: str, base: str, given: Mapping[str, str], budget: int
    ) -> None:
        with self.transaction():
            self.db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, 1)", (run, round, verb, base, budget)
            )
            self.db.execute("DELETE FROM asked WHERE run = ? AND round = ? AND verb = ?", (run, round, verb))
            self.db.executemany(
                "INSERT INTO asked VALUES (?, ?, ?, ?, ?)",
                [(run, round, verb, client, state) for client, state in given.items()],
            )

    def close_round(
        self, run: str, round: int, verb: str, why: Mapping[str, str], again: Collection[str] = ()
    ) -> None:
        """Who was asked and is not accepted by now is left out of this question for good, whatever happens to
        the process that asks; but for those in `again`."""
        about = (run, round, verb)
        with self.transaction():
            self.db.execute("UPDATE rounds SET open = 0 WHERE run = ? AND round = ? AND verb = ?", about)
            late = self.db.execute(
                "SELECT client FROM asked WHERE run = ? AND round = ? AND verb = ? EXCEPT "
                "SELECT client FROM accepted WHERE run = ? AND round = ? AND verb = ?",
                about * 2,
            ).fetchall()
            self.db.executemany(
                "INSERT OR IGNORE INTO left_out VALUES (?, ?, ?, ?, ?)",
                [(*about, client, why.get(client, "")) for (client,) in late if client not in again],
            )

    def left_out(self, run: str, round: int, verb: str) -> dict[str, str]:
        """Clients that a question was closed without, and why."""
        text = "SELECT client, why FROM left_out WHERE run = ? AND round = ? AND verb = ?"
        return dict(self.query(text, run, round, verb))

    def let_in(self, run: str, anew: bool = False) -> None:
        """A round was given up before it was committed: when it is asked anew, everybody may answer;
        `anew`: and has to."""
        with self.transaction():
            self.db.execute("DELETE FROM left_out WHERE run = ?", (run,))
            if anew:
                self.db.execute("DELETE FROM accepted WHERE run = ? AND released = 0", (run,))

    def accepted(self, run: str, round: int, verb: str) -> list[Accepted]:
        rows = self.query(
            "SELECT row, client, payload, size FROM accepted WHERE run = ? AND round = ? AND verb = ? AND "
            "released = 0 ORDER BY client",
            run,
            round,
            verb,
        )
        return [Accepted(row, client, Sha256(payload), size) for row, client, payload, size in rows]

    def forget(self, run: str, round: int, verb: str, client: str) -> None:
        """Take back an acceptance whose bytes were lost, so that the client can be asked again."""
        with self.transaction():
            self.db.execute(
                "DELETE FROM accepted WHERE run = ? AND round = ? AND verb = ? AND client = ? AND released = "
                "0",
                (run, round, verb, client),
            )

    def release(self, run: str, through: int, remove: Callable[[Sha256], None]) -> None:
        """Rounds that nobody will ask about again: what only they need is removed, receipts stay."""
        with self.transaction():
            past = (run, through)
            freed = self.db.execute(
                "SELECT DISTINCT payload FROM accepted WHERE run = ? AND round <= ? AND released = 0", past
            ).fetchall()
            freed += self.db.execute(
                "SELECT DISTINCT given FROM asked WHERE run = ? AND round <= ?", past
            ).fetchall()
            self.db.execute("UPDATE accepted SET released = 1 WHERE run = ? AND round <= ?", past)
            self.db.execute("DELETE FROM asked WHERE run = ? AND round <= ?", past)
            self.db.execute("DELETE FROM rounds WHERE run = ? AND round <= ?", past)
            self.db.execute("DELETE FROM left_out WHERE run = ? AND round <= ?", past)
            for (sha256,) in freed:
                if not self.db.execute(
                    "SELECT 1 FROM asked WHERE run = ? AND given = ?", (run, sha256)
                ).fetchone():
                    self.db.execute("DELETE FROM pins WHERE run = ? AND sha256 = ?", (run, sha256))
                if not self.wanted(sha256):
                    remove(Sha256(sha256))

    def wanted(self, sha256: str) -> bool:
        """Whether any run needs an object."""
        text = (
            "SELECT 1 FROM pins WHERE sha256 = ? UNION SELECT 1 FROM accepted WHERE payload = ? AND released "
            "= 0"
        )
        return bool(self.query(text, sha256, sha256))

    # --- the service's half ---

    def asked(self, run: str, round: int, verb: str, client: str) -> Asked | None:
        text = (
            "SELECT base, given, budget, open FROM asked NATURAL JOIN rounds WHERE run = ? AND round = ? AND "
            "verb = ? AND client = ?"
        )
        rows = self.query(text, run, round, verb, client)
        return Asked(rows[0][0], rows[0][1], rows[0][2], bool(rows[0][3])) if rows else None

    def may_fetch(self, run: str, client: str, sha256: str) -> bool:
        return bool(
            self.query("SELECT 1 FROM asked WHERE client = ? AND run = ? AND given = ?", client, run, sha256)
        )

    def is_member(self, run: str, client: str) -> bool:
        return bool(
            self.query(
                "SELECT 1 FROM asked WHERE client = ? AND run = ? UNION SELECT 1 FROM accepted WHERE client "
                "= ? AND run = ?",
                *(client, run) * 2,
            )
        )

    def receipt(self, run: str, round: int, verb: str, client: str) -> tuple[str, Signed] | None:
        """The payload that was accepted, and the receipt as it was first given."""
        text = (
            "SELECT payload, record, seal, pem FROM accepted JOIN certificates ON sealer = sha256 WHERE run "
            "= ? AND round = ? AND verb = ? AND client = ?"
        )
        rows = self.query(text, run, round, verb, client)
        return (rows[0][0], Signed(*rows[0][1:])) if rows else None

    def accept(
        self,
        envelope: Envelope,
        signature: bytes,
        peer: Peer,
        certificate: bytes,
        receipt: Callable[[int, datetime], Signed],
        there: Callable[[], bool],
    ) -> Signed:
        """Make an update count whose bytes are `there`. Raises Refused W604, W605, FedtuneError E803,
        E805."""
        key = (envelope.run, envelope.round, envelope.verb, envelope.client)
        with self.transaction():
            asked = self.asked(*key)
            if not asked or not asked.open:
                raise Refused(
                    "W604",
                    f"round {envelope.round}, which has been closed",
                    "an open round",
                    "drop this update",
                )
            if held := self.receipt(*key):  # two connections of one client at the same time
                if held[0] == envelope.payload:
                    return held[1]
                raise second(envelope)
            if not there():  # another run had the same bytes and let go of them just now
                raise absent(envelope.payload)
            self.replays.take(peer.key, envelope.sequence)
            row = self.db.execute(
                "SELECT COALESCE(MAX(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'accepted'"
            ).fetchone()[0]
            signed = receipt(row, datetime.now(UTC))
            about = (
                row,
                *key,
                envelope.payload,
                envelope.size,
                envelope.encode(),
                signature,
                self._proof(certificate),
            )
            values = (*about, signed.record, signed.signature, self._proof(signed.certificate))
            self.db.execute(f"INSERT INTO accepted VALUES ({', '.join('?' * len(values))}, 0)", values)
        return signed

    def _proof(self, pem: bytes) -> str:
        name = hashlib.sha256(pem).hexdigest()
        self.db.execute("INSERT OR IGNORE INTO certificates VALUES (?, ?)", (name, pem))
        return name

    def newest(self, key: str) -> int:
        """The highest count taken from a key; 0: none yet."""
        with self._lock, self.sentences():
            return self.replays.newest(key)

    def check_sequence(self, key: str, sequence: int) -> None:
        """Raises Refused W605."""
        with self._lock, self.sentences():
            self.replays.check(key, sequence)

    def progress(self, run: str = "", client: str = "", limit: int = 64) -> list[Progress]:
        """The newest rounds of all runs, of one, or of those that a client is a member of."""
        text = """SELECT run, round, verb, open, (SELECT COUNT(*) FROM asked a WHERE (a.run, a.round, a.verb) = (r.run, r.round, r.verb)),
                         COUNT(size), COALESCE(SUM(size), 0)
                  FROM rounds r LEFT JOIN accepted USING (run, round, verb)
                  WHERE (?1 = '' OR run = ?1) AND (?2 = '' OR run IN (SELECT run FROM asked WHERE client = ?2))
                  GROUP BY run, round, verb ORDER BY r.rowid DESC LIMIT ?3"""
        rows = self.query(text, run, client, limit)
        return [Progress(run, round, verb, bool(is_open), *rest) for run, round, verb, is_open, *rest in rows]


def second(envelope: Envelope) -> FedtuneError:
    found = f"another update of '{envelope.client}' for '{envelope.verb}' of round {envelope.round}"
    return FedtuneError("E805", found, "the one that was accepted", "nothing to do: the first one counts")
