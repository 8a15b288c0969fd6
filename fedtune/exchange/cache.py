"""A client's states by hash, so that what it has is not sent again; the least recently used go when the
folder is full."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from fedtune.disk import disk_errors, sync_folder
from fedtune.exchange.objects import digest_of
from fedtune.forms import Sha256
from fedtune.trust import private


class Cache:
    """One folder of at most `cap` bytes; the newest object stays even where it alone is more."""

    def __init__(self, folder: Path, cap: int) -> None:
        self.folder, self.cap = folder, cap
        private.make_folder(folder)

    def get(self, sha256: Sha256) -> bytes | None:
        """The object, if it is here and whole; a damaged one is removed."""
        path = self.folder / sha256
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def part(self, sha256: Sha256) -> Path:
        """Where an object that is on its way is gathered."""
        return self.folder / f"{sha256}.part"

    def keep(self, sha256: Sha256) -> bool:
        """Make a gathered file an object; False, and the file is gone, where its bytes are others. Raises
        R404."""
        part = self.part(sha256)
        with disk_errors(part):
            if digest_of(part) != sha256:
                part.unlink()
                return False
            with part.open("rb") as handle:
                os.fsync(handle.fileno())
            part.replace(self.folder / sha256)
            sync_folder(self.folder)
        self._trim(sha256)
        return True

    def _trim(self, newest: str) -> None:
        for part in self.folder.glob("*.part"):  # of states that nobody asks for any more
            part.unlink(missing_ok=True)
        objects = sorted(
            (
                path
                for path in self.folder.iterdir()
                if Sha256.form.fullmatch(path.name) and path.name != newest
            ),
            key=lambda p: p.stat().st_mtime_ns,
        )
        total = sum(path.stat().st_size for path in [*objects, self.folder / newest])
        for path in objects:
            if total <= self.cap:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
