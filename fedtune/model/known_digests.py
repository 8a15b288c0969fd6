"""Digests of large models, kept on disk between starts: to hash 8 billion numbers takes 12 to 35 seconds of
every process, and nothing of it changes while the files do not.

A digest is found again by all that it follows from. Of files that is what the system says of them (path,
size, times of the last change to content and to what the system knows, inode) and not what is in them; who
may change a model's files and set the system's clock back may put one model in another's place here, as in
its folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WORTH = 64 << 20  # bytes below which a model is hashed as fast as a digest is found
DIGEST = re.compile("[0-9a-f]{64}")

About = tuple[str, int, int, int, int]  # of a file: path, bytes, mtime_ns, ctime_ns, inode


def about_files(paths: Sequence[Path]) -> tuple[About, ...]:
    """What the system says of files. To be asked before they are read."""
    found = []
    for path in paths:
        real = path.resolve()
        stat = real.stat()
        found.append((str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(found)


def folder() -> Path:
    """$XDG_CACHE_HOME/fedtune/digests (~/.cache/fedtune/digests): a file of 64 bytes for each."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return place / "fedtune" / "digests"


def known_or(follows_from: Any, size: int, compute: Callable[[], str]) -> str:
    """A SHA-256 as hex: the one that was kept under what it follows from (JSON), or what `compute` says, kept
    from now on. Where nothing can be kept, or for few bytes (`size`), it is computed."""
    if size < WORTH:
        return compute()
    key = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()
    path = folder() / key
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = path.read_text()
        if DIGEST.fullmatch(text):
            return text
    made = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(".part", ".", path.parent)  # of mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(made)
        os.replace(part, path)
    return made
