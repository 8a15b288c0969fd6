"""Files that are whole or absent, whatever the disk or the power does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fedtune.errors import FedtuneError


def json_text(content: Any, **layout: Any) -> str:
    """JSON and nothing else: a number that is not finite, which JSON does not know, becomes null."""
    return json.dumps(finite(content), sort_keys=True, default=str, allow_nan=False, **layout)


def finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Temporary file, fsync, rename, fsync of the folder; `mode` less the process's umask, before anything
    is in the file. Raises R404."""
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def took(handle: IO[str]) -> bool:
    """Lock an open file for this process, if no other has it; the lock falls with the handle, or with the
    process, however it dies."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says into a sentence."""
    try:
        yield
    except OSError as error:
        why = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise FedtuneError(
            "R404",
            sentence=f"cannot write '{path}' ({why})",
            do="free space, or correct the rights or --runs, then: fedtune resume",
        ) from error
