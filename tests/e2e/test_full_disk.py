"""A disk that fills up in the middle of a run: one sentence, what was committed is kept, and the run goes on
when there is room."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from tests import small
from tests.forked import Program, run_fedtune


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB: room for a run whose states take 88 KB each."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no byte of the disk to anybody else."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    return filler


@pytest.mark.thorough
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root"
)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
    tiny_disk: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    tree = small.tree(tiny_bert, small.write_rows(tmp_path), method__adapter={"kind": "full"}, rounds=60)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(tree))
    run = tiny_disk / "mine"
    simulation = Program("-m", "fedtune", "simulate", str(tmp_path / "mine.toml"), "--runs", str(tiny_disk))
    while simulation.poll() is None and not (run / "state" / "round-0001.safetensors").exists():
        time.sleep(0.005)
    filler = fill(tiny_disk)
    stopped = simulation.finish()
    said = stopped.stderr
    assert stopped.returncode == 2 and "R404" in said and "no space left" in said, said
    assert "Traceback" not in said
    assert not (run / "result.json").exists() and not list(run.glob("**/*.part"))
    filler.unlink()
    done = run_fedtune("resume", str(run))
    assert done.returncode == 0, done.stderr
    _, undisturbed, _ = small.play(small.config.parse(tree), tmp_path / "elsewhere")
    assert json.loads((run / "result.json").read_text())["state_sha256"] == undisturbed["state_sha256"]
