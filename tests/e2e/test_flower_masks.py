"""Masked sums on Flower's simulation engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.runtime.folder import RunFolder
from tests import small
from tests.conformance.recipes import METHODS

pytest.importorskip("fedtune.flower.simulation")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name.endswith("-mask")])
def test_masks_on_the_simulation_engine_change_no_byte(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Keys, shares and sums go through Ray's actors; what is left is the run without masks."""
    masked = METHODS[name]
    plain = masked | {"chain": masked["chain"][:-1] or [{"step": "ring"}]}
    recipe = small.write_recipe(tmp_path / "small.toml", tiny_bert, data, **masked)
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "simulate", str(recipe), "--engine", "flower"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, result, _ = small.play(small.recipe(tiny_bert, data, **plain), tmp_path / "local")
    folder = RunFolder(tmp_path / "runs" / "small")
    assert folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
