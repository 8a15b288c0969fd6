"""A disk that fills up in the middle of a run: one sentence, what was committed is kept, and the run goes on
when there is room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from tests import small


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB: room for the first states of a run of 84 KB each and the journal, not for
    all."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root"
)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
    tiny_disk: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    tree = small.tree(tiny_bert, small.write_rows(tmp_path), method__adapter={"kind": "full"}, rounds=3)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(tree))
    filler = tiny_disk / "filler"
    filler.write_bytes(b"0" * 360_000)

    def fedtune(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedtune", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    stopped = fedtune("simulate", str(tmp_path / "mine.toml"), "--runs", str(tiny_disk))
    run = tiny_disk / "mine"
    assert (
        stopped.returncode == 2
        and "R404" in stopped.stderr
        and "no space left" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert not (run / "result.json").exists() and not list(run.glob("**/*.part"))
    filler.unlink()
    done = fedtune("resume", str(run))
    assert done.returncode == 0, done.stderr
    _, undisturbed, _ = small.play(small.config.parse(tree), tmp_path / "elsewhere")
    assert json.loads((run / "result.json").read_text())["state_sha256"] == undisturbed["state_sha256"]
