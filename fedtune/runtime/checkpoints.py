"""States of the server and of clients on disk, as safetensors: flat names, a SHA-256 each, never a pickle."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder
from fedtune.transforms.downlink import HeldState
from fedtune.types import State, Tensors


def save_state(folder: RunFolder, number: int, state: State, held: HeldState | None = None) -> str:
    """Write a round's state, and what clients hold of it where the downlink is lossy; returns the SHA-256 of
    the file."""
    flat = {f"shared/{k}": v for k, v in state.shared.items()} | {
        f"kept/{k}": v for k, v in state.kept.items()
    }
    if held:
        flat |= {f"held/{k}": v for k, v in held.tensors.items()} | {
            "held.round": np.asarray(held.round, np.int64)
        }
    return save_tensors(folder.state(number), flat)


def load_state(folder: RunFolder, number: int, sha256: str) -> tuple[State, HeldState | None]:
    """Read a round's state back. Raises R403 where the file is missing, cut or altered."""
    flat = load_tensors(folder.state(number), sha256)
    parts: dict[str, dict[str, np.ndarray]] = {"shared": {}, "kept": {}, "held": {}}
    when = flat.pop("held.round", None)
    for name, value in flat.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return State(parts["shared"], parts["kept"]), None if when is None else HeldState(
        int(when), parts["held"]
    )


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
                "R403",
                f"'{path}' with SHA-256 {found[:12]}",
                f"{sha256[:12]} as the journal says",
                "restore the file from a backup, or start a new run",
            )
        return dict(load(content))
    except (OSError, SafetensorError) as error:
        raise FedtuneError(
            "R403",
            f"'{path}', which cannot be read ({type(error).__name__})",
            "a state file",
            "restore it from a backup, or start a new run",
        ) from error


class ClientStates:
    """What clients keep between rounds: on disk one file per client and counted round, so that a resumed run
    sees just those, and main memory holds those of the clients that a round asks.

    held     client -> round -> its state after it: of this round, or without a folder of all
    counted  client -> round of its last answer that counted, and SHA-256 of the file ("" for an empty state)
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.held: dict[int, dict[int, dict[str, np.ndarray]]] = {}
        self.counted: dict[int, tuple[int, str]] = {}

    def of(self, client: int) -> dict[int, dict[str, np.ndarray]]:
        """Raises R403 where its file is missing or altered."""
        if self.folder and client not in self.held and client in self.counted:
            number, sha256 = self.counted[client]
            if sha256:
                self.held[client] = {number: load_tensors(self.folder.client_state(client, number), sha256)}
        return self.held.get(client, {})

    def save(self, number: int, counted: Iterable[int]) -> dict[int, str]:
        """Before the round's commit: the clients' states behind the answers that count; their files' SHA-256
        by client.

        Empty states make no file. Where clients sit in other processes of this machine, they have written
        the file themselves.
        """
        digests = {}
        for client in counted if self.folder else []:
            path = self.folder.client_state(client, number)  # type: ignore[union-attr]
            if remembered := self.held.get(client, {}).get(number):
                digests[client] = save_tensors(path, remembered)
            elif path.exists():
                digests[client] = hashlib.sha256(path.read_bytes()).hexdigest()
        return digests

    def restore(self, known: Mapping[int, tuple[int, str]]) -> None:
        """After a crash: the state behind each client's last answer that counted; others never will and are
        removed.

        `known`: client -> (round, SHA-256 of its state, "" where it had none). Raises R403 where one is
        missing or altered.
        """
        if self.folder is None:
            return
        for path in self.folder.path.glob("memory/client-*/round-*.safetensors"):
            if round_of(path) != known.get(int(path.parent.name.removeprefix("client-")), (0, ""))[0]:
                path.unlink()
        for client, (number, sha256) in known.items():
            if sha256:
                load_tensors(self.folder.client_state(client, number), sha256)
        self.counted = dict(known)

    def prune(self, number: int, digests: Mapping[int, str]) -> None:
        """After the commit: clients' states that this round's replaced go, and so does what is in main memory
        of those on disk. `digests`: of each client whose answer counted, as `save` gave them, "" for none."""
        if self.folder is None:
            return
        for client, sha256 in digests.items():
            for path in self.folder.client_state(client, number).parent.glob("round-*.safetensors"):
                if round_of(path) < number:
                    path.unlink()
            self.counted[client] = number, sha256
        self.held.clear()


def round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def prune_states(folder: RunFolder, committed: int, keep: int = 2, also: int | None = None) -> None:
    """Remove states that no commit names (a crash left them) and those older than the last `keep`, but not
    that of round `also`."""
    for path in (folder.path / "state").glob("round-*.safetensors"):
        if not committed - keep < round_of(path) <= committed and round_of(path) != also:
            path.unlink()


def sweep(folder: RunFolder) -> None:
    """Remove what a crash left half-written."""
    for part in list(folder.path.glob("**/.*.part")):
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
