"""States and client memories on disk, as safetensors: flat names, a SHA-256 each, never a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder
from fedtune.transforms.broadcast import Held
from fedtune.types import State, Tensors


def save_state(folder: RunFolder, number: int, state: State, held: Held | None = None) -> str:
    """Write a round's state, and what clients hold of it where the downlink is lossy; returns the SHA-256 of the file."""
    flat = {f"shared/{k}": v for k, v in state.shared.items()} | {f"kept/{k}": v for k, v in state.kept.items()}
    if held:
        flat |= {f"held/{k}": v for k, v in held.tensors.items()} | {"held.round": np.asarray(held.round, np.int64)}
    return save_tensors(folder.state(number), flat)


def load_state(folder: RunFolder, number: int, sha256: str) -> tuple[State, Held | None]:
    """Read a round's state back. Raises R403 where the file is missing, cut or altered."""
    flat = load_tensors(folder.state(number), sha256)
    parts: dict[str, dict[str, np.ndarray]] = {"shared": {}, "kept": {}, "held": {}}
    when = flat.pop("held.round", None)
    for name, value in flat.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return State(parts["shared"], parts["kept"]), None if when is None else Held(int(when), parts["held"])


def save_tensors(path: Path, tensors: Tensors) -> str:
    content = save({name: np.asarray(value, order="C") for name, value in tensors.items()})
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
    """What clients keep between rounds: on disk one file per client and counted round, so that a resumed run sees just those."""

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.held: dict[int, dict[int, dict[str, np.ndarray]]] = {}  # client -> round -> memory after it

    def of(self, client: int) -> dict[int, dict[str, np.ndarray]]:
        return self.held.get(client, {})

    def save(self, number: int, counted: Iterable[int]) -> None:
        """Before the round's commit: the memories behind the answers that count. Empty memories make no file."""
        for client in counted:
            if self.folder and self.of(client).get(number):
                save_tensors(self.folder.memory(client, number), self.of(client)[number])

    def restore(self, committed: int) -> None:
        """After a crash: the memories of committed rounds; later ones belong to answers that never counted."""
        root = self.folder.path / "memory" if self.folder else None
        for path in sorted(root.glob("client-*/round-*.safetensors")) if root and root.exists() else []:
            client, number = int(path.parent.name.removeprefix("client-")), round_of(path)
            if number > committed:
                path.unlink()
            else:
                self.held[client] = {number: load_tensors(path)}

    def prune(self, number: int, counted: Iterable[int]) -> None:
        """After the commit: memories that this round's replaced."""
        for client in counted:
            for path in self.folder.memory(client, number).parent.glob("round-*.safetensors") if self.folder else []:
                if round_of(path) < number:
                    path.unlink()


def round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def prune_states(folder: RunFolder, committed: int, keep: int = 2) -> None:
    """Remove states that no commit names (a crash left them) and those older than the last `keep`."""
    for path in (folder.path / "state").glob("round-*.safetensors"):
        if not committed - keep < round_of(path) <= committed:
            path.unlink()
    for part in folder.path.glob("**/.*.part"):
        part.unlink()
