"""States and client memories on disk, as safetensors: flat names, a SHA-256 each, never a pickle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder
from fedtune.types import State, Tensors


def save_state(folder: RunFolder, number: int, state: State) -> str:
    """Write a round's state; returns the SHA-256 of the file."""
    flat = {f"shared/{k}": v for k, v in state.shared.items()} | {f"kept/{k}": v for k, v in state.kept.items()}
    return save_tensors(folder.state(number), flat)


def load_state(folder: RunFolder, number: int, sha256: str) -> State:
    """Read a round's state back. Raises R403 where the file is missing, cut or altered."""
    flat = load_tensors(folder.state(number), sha256)
    parts: dict[str, dict[str, np.ndarray]] = {"shared": {}, "kept": {}}
    for name, value in flat.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return State(parts["shared"], parts["kept"])


def save_tensors(path: Path, tensors: Tensors) -> str:
    content = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(path: Path, sha256: str = "") -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if sha256 and found != sha256:
            raise FedtuneError(
                "R403", f"'{path}' with SHA-256 {found[:12]}", f"{sha256[:12]} as the journal says", "restore the file from a backup, or start a new run"
            )
        return dict(load(content))
    except (OSError, SafetensorError) as error:
        raise FedtuneError(
            "R403", f"'{path}', which cannot be read ({type(error).__name__})", "a state file", "restore it from a backup, or start a new run"
        ) from error


class Memories:
    """What clients keep between rounds, one file per client and round, so that a resumed run sees the committed one."""

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.held: dict[int, dict[str, np.ndarray]] = {}

    def of(self, client: int) -> dict[str, np.ndarray]:
        return self.held.setdefault(client, {})

    def save(self, number: int, members: Mapping[int, object]) -> None:
        """Before the round's commit: write the memories that this round touched. Empty memories make no file."""
        for client in members:
            if self.folder and self.held.get(client):
                save_tensors(self.folder.memory(client, number), self.held[client])

    def restore(self, committed: int) -> None:
        """After a crash: the newest memory of each client that belongs to a committed round; later ones are removed."""
        root = self.folder.path / "memory" if self.folder else None
        for path in sorted(root.glob("client-*/round-*.safetensors")) if root and root.exists() else []:
            client, number = (int(n) for n in re.findall(r"\d+", f"{path.parent.name} {path.stem}"))
            if number > committed:
                path.unlink()
            else:
                self.held[client] = load_tensors(path)

    def prune(self, committed: int) -> None:
        """After the commit: memories that a newer committed one replaces."""
        for client in self.held:
            paths = sorted(self.folder.memory(client, 0).parent.glob("round-*.safetensors")) if self.folder else []
            for path in paths[:-1]:
                if int(path.stem.removeprefix("round-")) < committed:
                    path.unlink()


def prune_states(folder: RunFolder, committed: int, keep: int = 2) -> None:
    """Remove states that no commit names (a crash left them) and those older than the last `keep`."""
    for path in (folder.path / "state").glob("round-*.safetensors"):
        if not committed - keep < int(path.stem.removeprefix("round-")) <= committed:
            path.unlink()
    for part in folder.path.glob("**/.*.part"):
        part.unlink()
