"""The files of a checkpoint: where they lie, and which type their numbers have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


def folder_of(place: str, revision: str = "") -> Path | None:
    """A folder, or that of a hub's name in the cache; None where it is not on this machine. No network."""
    if (Path(place) / "config.json").exists():
        return Path(place)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(place, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name that a hub could have
        return None


def weight_files(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter_model")
    ]


def stored_type(place: str, revision: str = "") -> torch.dtype:
    """The type of half precision that all real numbers of a checkpoint have; float32, which holds those of
    all common types, otherwise."""
    found = set[str]()
    for path in weight_files(folder) if (folder := folder_of(place, revision)) else []:
        with safe_open(str(path), framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    real = {name for name in found if "F" in name}
    return HALF.get(real.pop(), torch.float32) if len(real) == 1 else torch.float32
