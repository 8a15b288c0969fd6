"""Disks that fill up or rot under a deployed run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deploying import MEMORY, Deployment, lines_of, point
from tests.e2e.faults.conftest import Oracle, counts
from tests.e2e.test_flower import journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(federation: Deployment) -> Iterator[Any]:
    """Mounts small file systems under the coordinator's folders."""
    mounted: list[Path] = []

    def mount(path: Path, size: str) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(path)
        return path

    yield mount
    federation.close()
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_for_updates_that_is_full_and_then_freed(
    small_disk: Any, federation: Deployment, oracle: Oracle
) -> None:
    """The exchange keeps 64 MiB free; with less it takes nothing, and what sites have finished waits with
    them."""
    exchange = small_disk(federation.root / "runs" / ".coordinator" / "exchange", "80m")
    filler = exchange / "filler"
    filler.write_bytes(bytes(20 << 20))
    federation.serve(oracle.recipe(federation))
    federation.join_all()
    refused = federation.root / "runs" / ".coordinator" / "gateway.jsonl"
    federation.wait(
        lambda: sum(e.get("code") == "E804" for e in lines_of(refused)) >= 3,
        "three sites that are told to wait",
    )
    assert (
        "room for 0 bytes of updates on the coordinator's disk" in lines_of(refused)[0]["text"]
        and counts(federation) == 0
    )
    filler.unlink()
    assert federation.ended() == 0
    oracle.same(federation)


def test_a_disk_for_the_run_that_is_full_ends_it_with_a_sentence_and_resume_goes_on(
    small_disk: Any, federation: Deployment, oracle: Oracle
) -> None:
    run = small_disk(federation.root / "runs" / "run", "2m")
    federation.serve(oracle.recipe(federation))
    federation.join_all()
    federation.wait_accepted(1)
    free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
    (run / "filler").write_bytes(bytes(free - 8192))
    code = federation.ended()
    said = federation.said("server")
    assert (
        code == 2
        and "R404" in said
        and "no space left" in said
        and "fedtune resume" in said
        and "Traceback" not in said
    )
    (run / "filler").unlink()
    federation.resume("run")
    assert federation.ended() == 0
    (run / "filler").unlink(missing_ok=True)
    oracle.same(federation)


@pytest.mark.parametrize("what", ["update", "state"])
def test_an_object_that_rots_on_the_coordinators_disk(
    what: str, federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    """A flipped byte in an update that was accepted, or in the state that is laid out for round 2: put aside,
    and made again."""
    flip = "(lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])))"
    if what == "update":
        rot = point(
            "fedtune.exchange.round_ledger:RoundLedger.accept",
            tmp_path / "rot",
            "after",
            do=f"{flip}(args[0].path.parent / 'objects' / args[1].payload)",
        )
    else:
        rot = point(
            "fedtune.exchange.server_store:ServerStore.open_round",
            tmp_path / "rot",
            "after",
            "args[2] == 2",
            do=f"{flip}(args[0].store.path(next(iter(args[5].values()))))",
        )
    federation.serve(oracle.recipe(federation), points=[rot])
    federation.join_all()
    assert federation.ended() == 0 and (tmp_path / "rot").exists()
    assert len(list((federation.root / "runs" / ".coordinator" / "exchange" / "damaged").iterdir())) == 1
    alone, result = oracle(**MEMORY)
    assert federation.folder("run").read_json("result.json")["state_sha256"] == result["state_sha256"]
    assert journal(federation.folder("run")) == journal(alone) and counts(federation) == 9
