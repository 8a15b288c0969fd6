"""An expert leaves a saved router."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fedtune.experts.routers import GATES, LIVING, SETTINGS


def drop(folder: Path, name: str) -> bool:
    """Take an expert out of a saved router, whose scores of the others stay. False, and nothing changes,
    where fewer than two would be left to choose from; True as well where it does not know the expert."""
    about = json.loads((folder / SETTINGS).read_text())
    if name not in about["experts"]:
        return True
    if len(about["experts"]) + about["null"] < 3:
        return False
    living, left = about.get(LIVING, {}), dict[str, np.ndarray]()
    for key, value in load_file(folder / GATES).items():
        here = living.get(key.rpartition(".")[0], about["experts"])
        value = np.delete(value, here.index(name), 0) if name in here else value
        if len(value):
            left[key] = value
    about["experts"].remove(name)
    for here in living.values():
        if name in here:
            here.remove(name)
    for known in (about.get(key, {}) for key in ("shares", "sha256s")):
        known.pop(name, None)
    save_file(left, folder / GATES)
    (folder / SETTINGS).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    return True
