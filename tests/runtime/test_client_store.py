"""What a site keeps between its answers: versions of its state, and secrets that only their owner reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import FedtuneError
from fedtune.runtime.client_store import FolderVault, load_versions, save_versions
from fedtune.runtime.folder import RunFolder


def test_versions_come_back_and_no_others_stay(tmp_path: Path) -> None:
    def kept(client: int) -> dict[int, list[float]]:
        return {number: held["r"].tolist() for number, held in load_versions(tmp_path, client).items()}

    assert kept(3) == {}
    save_versions(tmp_path, 3, {1: {"r": np.float32([1])}, 2: {"r": np.float32([2, 3])}})
    save_versions(tmp_path, 4, {1: {"r": np.float32([9])}})
    assert kept(3) == {1: [1.0], 2: [2.0, 3.0]} and kept(4) == {1: [9.0]}
    assert RunFolder(tmp_path).client_state(3, 2).exists()
    save_versions(tmp_path, 3, {2: {"r": np.float32([5])}, 7: {"r": np.float32([7])}})
    assert kept(3) == {2: [5.0], 7: [7.0]} and kept(4) == {1: [9.0]}
    RunFolder(tmp_path).client_state(3, 7).write_bytes(b"half")
    with pytest.raises(FedtuneError, match="R403"):
        load_versions(tmp_path, 3)
    save_versions(tmp_path, 3, {})
    assert kept(3) == {}


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    vault = FolderVault(tmp_path / "deep" / "vault")
    assert vault.read("a") is None and vault.names() == []
    vault.write("b", b"two")
    vault.write("a", b"one")
    (vault.folder / ".b.part").write_bytes(b"half")
    assert vault.names() == ["a", "b"] and (vault.read("a"), vault.read("b")) == (b"one", b"two")
    assert vault.folder.stat().st_mode & 0o777 == 0o700
    assert {(vault.folder / name).stat().st_mode & 0o777 for name in vault.names()} == {0o600}
    vault.folder.chmod(0o755)
    vault.write("a", b"three")
    assert vault.read("a") == b"three" and vault.folder.stat().st_mode & 0o777 == 0o700
    vault.remove("a")
    vault.remove("a")
    assert vault.names() == ["b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FedtuneError, match="R404"):
        FolderVault(tmp_path / "file" / "vault").write("a", b"")
