"""What one client remembers, on its own disk: a file for each version, whole or absent. And the secrets of
a round's masked sums, which only the owner of the files can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedtune.disk import disk_errors, write_atomic
from fedtune.runtime.checkpoints import load_tensors, round_of, save_tensors
from fedtune.runtime.folder import RunFolder

Versions = Mapping[int, dict[str, np.ndarray]]  # round -> the client's state after it


def load_versions(place: Path, client: int) -> dict[int, dict[str, np.ndarray]]:
    """Raises R403."""
    return {
        round_of(path): load_tensors(path)
        for path in RunFolder(place).client_state(client, 0).parent.glob("round-*.safetensors")
    }


def save_versions(place: Path, client: int, versions: Versions) -> None:
    """Keep these and no others. Raises R404."""
    for number, tensors in versions.items():
        save_tensors(RunFolder(place).client_state(client, number), tensors)
    for path in RunFolder(place).client_state(client, 0).parent.glob("round-*.safetensors"):
        if round_of(path) not in versions:
            path.unlink()


class FolderVault:
    """A vault on disk, for a client that may be started again between two steps of a masked sum: files of
    mode 0600 in a folder of mode 0700. Raises R404."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def write(self, name: str, secret: bytes) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        write_atomic(self.folder / name, secret, 0o600)

    def names(self) -> list[str]:
        found = self.folder.iterdir() if self.folder.exists() else ()
        return sorted(path.name for path in found if not path.name.startswith("."))

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
