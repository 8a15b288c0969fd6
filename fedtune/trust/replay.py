"""Replays are found by a sliding window over each sender's own count (RFC 4303, section 3.4.3), kept in the
caller's database.

Bounded: one row a key, 64 bytes each, whatever the number of messages. Persistent: it is written in the
transaction that accepts
the message, so that neither a crash nor a restart lets one in twice.
"""

from __future__ import annotations

import sqlite3

from fedtune.errors import Refused

WINDOW = 256  # messages that may overtake one another; older ones are too old to be told from replays
TABLE = (
    "CREATE TABLE IF NOT EXISTS sequences (sender TEXT PRIMARY KEY, newest INTEGER NOT NULL, taken BLOB NOT "
    "NULL) STRICT"
)


class Replays:
    """The window of every sender. The caller brings the connection, the transaction and the lock."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        db.execute(TABLE)

    def newest(self, sender: str) -> int:
        """The highest count taken from this sender; 0: none yet."""
        return self._row(sender)[0]

    def check(self, sender: str, sequence: int) -> None:
        """Raises Refused W605 for a count that was taken, or is too old to tell."""
        newest, taken = self._row(sender)
        behind = newest - sequence
        if sequence < 1 or behind >= WINDOW:
            raise Refused(
                "W605",
                f"message {sequence} of a sender whose newest is {newest}",
                f"one above {max(newest - WINDOW, 0)}",
                "send a new message",
            )
        if behind >= 0 and taken >> behind & 1:
            raise Refused(
                "W605",
                f"message {sequence} for the second time",
                "each message once",
                "nothing: the first was taken",
            )

    def take(self, sender: str, sequence: int) -> None:
        """Count a message. Raises Refused W605 as `check` does."""
        self.check(sender, sequence)
        newest, taken = self._row(sender)
        ahead = sequence - newest
        if ahead > 0:
            newest, taken = sequence, taken << ahead if ahead < WINDOW else 0
        taken = (taken | 1 << (newest - sequence)) & (1 << WINDOW) - 1
        self.db.execute(
            "INSERT OR REPLACE INTO sequences VALUES (?, ?, ?)",
            (sender, newest, taken.to_bytes(WINDOW // 8)),
        )

    def _row(self, sender: str) -> tuple[int, int]:
        row = self.db.execute("SELECT newest, taken FROM sequences WHERE sender = ?", (sender,)).fetchone()
        return (int(row[0]), int.from_bytes(row[1])) if row else (0, 0)
