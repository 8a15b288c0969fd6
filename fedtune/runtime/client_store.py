"""What one client remembers, on its own disk: a file for each version, whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedtune.runtime.checkpoints import load_tensors, round_of, save_tensors
from fedtune.runtime.folder import RunFolder

Versions = Mapping[int, dict[str, np.ndarray]]  # round -> memory after it


def load_versions(place: Path, client: int) -> dict[int, dict[str, np.ndarray]]:
    """Raises R403."""
    return {
        round_of(path): load_tensors(path)
        for path in RunFolder(place).memory(client, 0).parent.glob("round-*.safetensors")
    }


def save_versions(place: Path, client: int, versions: Versions) -> None:
    """Keep these and no others. Raises R404."""
    for number, tensors in versions.items():
        save_tensors(RunFolder(place).memory(client, number), tensors)
    for path in RunFolder(place).memory(client, 0).parent.glob("round-*.safetensors"):
        if round_of(path) not in versions:
            path.unlink()
