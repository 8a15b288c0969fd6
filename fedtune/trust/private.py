"""Private files: only their owner may read them, on disk from the first byte and whenever they are read."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
from pathlib import Path

from fedtune.disk import disk_errors, sync_folder
from fedtune.errors import FedtuneError

SHARED = 32  # bytes
POSIX = os.name == "posix"  # elsewhere modes say nothing about who may read


def make_folder(path: Path) -> None:
    """A folder that only its owner may enter; one that is there must be so already. Raises R404, T701."""
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(path)


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Temporary file, fsync, rename, fsync of the folder; never readable for others in between. Raises
    R404."""
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}-{threading.get_ident()}.part"
    )  # two may write the same file at once
    with disk_errors(path):
        temporary.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def read(path: Path) -> bytes:
    """A private file's content. Raises T701, T702."""
    require_private(path)
    return read_public(path)


def shared_key(path: Path) -> bytes:
    """32 random bytes that several processes of one user share; the first makes them, and its folder. Raises
    R404, T701, T702."""
    if not path.exists():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write(fresh, secrets.token_bytes(SHARED))
        with disk_errors(path):
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)  # unlike a rename, it leaves alone what another process made meanwhile
            fresh.unlink()
            sync_folder(path.parent)
    key = read(path)
    if len(key) != SHARED:
        raise FedtuneError(
            "T702",
            f"a key of {len(key)} bytes at '{path}'",
            f"{SHARED} random bytes",
            "remove it, and restart all programs that share it",
        )
    return key


def read_public(path: Path) -> bytes:
    """A file of a key folder that anybody may read. Raises T702."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise missing(path, error) from None


def require_private(path: Path) -> None:
    """Raises T701 where others could read a key or enter its folder, T702 where it is not there."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise missing(path, error) from None
    if POSIX and mode & 0o077:
        wanted = "700" if path.is_dir() else "600"
        raise FedtuneError(
            "T701",
            f"mode {mode:04o} of '{path}'",
            f"0{wanted}: nobody but its owner may read a key",
            f"run: chmod {wanted} {path}",
        )


def missing(path: Path, error: OSError) -> FedtuneError:
    return FedtuneError(
        "T702",
        sentence=f"cannot read '{path}' ({error.strerror})",
        do="copy the whole folder that fedtune keys made again, or make a new one",
    )
