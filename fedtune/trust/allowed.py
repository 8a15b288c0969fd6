"""The allow list: which keys may speak, by hash. A key that the authority signed and that is not on the list
is nobody.

It stands beside the coordinator's keys, is written whole or not at all, and a running coordinator reads it
again when it changes:
that is how a revocation takes effect without a restart (grpc for Python has no revocation lists of its own).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.trust import private
from fedtune.trust.certificates import Peer, outdated


@dataclass(frozen=True)
class Entry:
    """One key of a member. Times are ISO 8601, UTC; `revoked` is "" while the key may speak."""

    name: str
    key: str
    starts: str
    ends: str
    revoked: str = ""

    def state(self, now: datetime) -> str:
        """valid, expired or revoked."""
        return (
            "revoked" if self.revoked else "valid" if now <= datetime.fromisoformat(self.ends) else "expired"
        )


def entry_of(peer: Peer) -> Entry:
    return Entry(peer.name.name, peer.key, peer.starts.isoformat(), peer.ends.isoformat())


def read_entries(path: Path) -> list[Entry]:
    """Raises T702."""
    content = private.read_public(path)
    try:
        entries = [Entry(**{str(k): str(v) for k, v in row.items()}) for row in json.loads(content)["keys"]]
        for entry in entries:
            datetime.fromisoformat(entry.ends)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FedtuneError(
            "T702",
            f"'{path}', which is not an allow list",
            "the file that fedtune keys writes",
            "restore it from a backup",
        ) from None
    return entries


def write_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Raises R404."""
    rows = [asdict(entry) for entry in sorted(entries, key=lambda e: (e.name, e.starts, e.key))]
    private.write(path, (json.dumps({"keys": rows}, indent=1) + "\n").encode(), 0o644)


class AllowList:
    """What a coordinator asks about a peer whose certificate TLS has accepted. Safe between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._entries: dict[str, Entry] = {}
        self._fresh()

    def check(self, peer: Peer, now: datetime | None = None) -> None:
        """Raises T706 for a key that is not on the list or revoked, T704 for one that has ended since the
        connection was made, T702 for a damaged list."""
        entry = self._fresh().get(peer.key)
        if entry is None or entry.name != peer.name.name:
            raise FedtuneError(
                "T706",
                f"a key of '{peer.name.name}' ({peer.key[:12]}) that is not on the allow list",
                "a key that was issued here",
                f"ask the coordinator's operator to run: fedtune keys issue {peer.name.name}",
            )
        if entry.revoked:
            raise FedtuneError(
                "T706",
                f"a key of '{entry.name}' ({entry.key[:12]}) that was revoked on {entry.revoked[:16]} UTC",
                "a valid key",
                f"ask the coordinator's operator to run: fedtune keys renew {entry.name}",
            )
        now = now or datetime.now(UTC)
        if not peer.starts <= now <= peer.ends:
            raise outdated(peer, now)

    def speaks(self, name: str, now: datetime | None = None) -> bool:
        """Whether a member of that name has any key that may speak now. Raises T702."""
        return any(
            entry.name == name and entry.state(now or datetime.now(UTC)) == "valid"
            for entry in self._fresh().values()
        )

    def _fresh(self) -> dict[str, Entry]:
        """The list as it is on disk now. A damaged one lets nobody in."""
        with self._lock:
            try:
                found = self.path.stat()
            except OSError as error:
                raise private.missing(self.path, error) from None
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                self._entries = {entry.key: entry for entry in read_entries(self.path)}
                self._stamp = stamp
            return self._entries
