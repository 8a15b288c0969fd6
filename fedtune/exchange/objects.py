"""Content-addressed files: whole, on disk, and what their name says, or not there.

objects/HASH     states and updates
incoming/*.part  uploads under way; what arrived is kept when the connection breaks
damaged/         objects whose bytes are no longer those of their name, for whoever wants to know why
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.disk import disk_errors, sync_folder
from fedtune.errors import FedtuneError
from fedtune.exchange.limits import CHUNK
from fedtune.forms import MemberName, Sha256
from fedtune.trust import private


@dataclass(frozen=True)
class Part:
    """An upload under way, by the name of its file: RUN-ROUND-CLIENT-ENVELOPE.part, hashes shortened."""

    path: Path
    round: int
    client: str
    envelope: str


class Store:
    """One folder; several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects, self.incoming, self.damaged = (
            folder / name for name in ("objects", "incoming", "damaged")
        )
        for place in (folder, self.objects, self.incoming, self.damaged):
            private.make_folder(place)

    def path(self, sha256: Sha256) -> Path:
        """Of a hash, and of nothing else: a name from outside never becomes a path."""
        return self.objects / sha256

    def has(self, sha256: Sha256) -> bool:
        return self.path(sha256).exists()

    def put(self, data: bytes, sha256: Sha256 | None = None) -> Sha256:
        """Keep bytes, whose hash the caller may know; what is there already is checked, and written again
        where it is damaged. Raises R404."""
        name = sha256 or Sha256(hashlib.sha256(data).hexdigest())
        path = self.path(name)
        if path.exists() and digest_of(path) == name:
            return name
        private.write(path, data)
        return name

    def adopt(self, part: Path, sha256: Sha256) -> None:
        """Make an uploaded file, already fsynced, the object of its hash. Raises R404."""
        with disk_errors(part):
            part.replace(self.path(sha256))
            sync_folder(self.objects)

    def read(self, sha256: Sha256) -> bytes:
        """Raises E803 where it is not there, E807 where it is damaged: it is then put aside."""
        return b"".join(self.stream(sha256))

    def size(self, sha256: Sha256) -> int:
        """Raises E803."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            raise absent(sha256) from None

    def stream(self, sha256: Sha256, offset: int = 0) -> Iterator[bytes]:
        """Pieces of at most CHUNK bytes. From the beginning, the last piece comes only after the hash was
        found right. Raises E803, E807."""
        digest, held = hashlib.sha256(), b""
        try:
            handle = self.path(sha256).open("rb")
        except FileNotFoundError:
            raise absent(sha256) from None
        with handle:
            handle.seek(offset)
            while piece := handle.read(CHUNK):
                digest.update(piece)
                if held:
                    yield held
                held = piece
        if not offset and digest.hexdigest() != sha256:
            self.quarantine(sha256)
            raise FedtuneError(
                "E807",
                sentence=f"object {sha256[:12]} does not match its hash",
                do="it was put aside; store it again",
            )
        if held:
            yield held

    def quarantine(self, sha256: Sha256) -> None:
        """Out of the way, but not lost; the newest of each name is kept."""
        with disk_errors(self.path(sha256)):
            self.path(sha256).replace(self.damaged / sha256)

    def remove(self, sha256: Sha256) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def part(self, run: str, round: int, client: MemberName, envelope: Sha256) -> Part:
        """Where an upload goes; `envelope` is its digest (hex)."""
        return Part(
            self.incoming / f"{short(run)}-{round:08d}-{client}-{envelope[:32]}.part",
            round,
            client,
            envelope[:32],
        )

    def parts(self, run: str) -> Iterator[Part]:
        """All uploads under way of a run."""
        for path in self.incoming.glob(f"{short(run)}-*.part"):
            if found := re.fullmatch(r"[0-9a-f]{16}-(\d+)-(.+)-([0-9a-f]{32})\.part", path.name):
                yield Part(path, int(found[1]), found[2], found[3])

    def free(self) -> int:
        """Bytes that the disk has left."""
        return shutil.disk_usage(self.folder).free


def digest_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, hashlib.sha256).hexdigest()


def short(run: str) -> str:
    """A run's id as a part of a file's name."""
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def absent(sha256: Sha256) -> FedtuneError:
    return FedtuneError(
        "E803",
        f"no object {sha256[:12]}",
        "one that was stored and not yet released",
        "ask for the state of an open round",
    )
