"""Compiling: once, when the module is imported; where the code is kept; and that neither instructions nor
threads nor process change a bit."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.zeroth import kernels, project, replay
from tests.zeroth.oracle import POOLS, perturb
from tests.zeroth.test_apply import joined, some, values

ROOT = Path(__file__).parents[2]
SCRIPT = "from tests.zeroth.test_kernels import fingerprint, kernels; print(fingerprint(), kernels.__file__)"


def fingerprint() -> str:
    """SHA-256 of walks, replays and projections of every kind of pool."""
    total = hashlib.sha256()
    for pool in POOLS:
        named = values()
        perturb(named, pool, 2, 1e-3)
        replay(named, [(pool, some(pool))], 1e-9)
        total.update(joined(named).tobytes() + project(named, pool).tobytes())
    return total.hexdigest()


@pytest.mark.thorough
def test_another_process_on_the_oldest_processor_that_can_keep_nothing(tmp_path: Path) -> None:
    """Compiled for x86-64 without AVX, torch without AVX, two threads, and neither the package nor a home can
    be written: the same bytes, no complaint."""
    for part in ("fedtune", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fedtune/zeroth/__pycache__").write_text(
        "a file where the folder should be: not even root can write into it"
    )
    oldest = (
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
        if platform.machine() == "x86_64"
        else {"NUMBA_CPU_NAME": "generic"}
    )
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))
    } | oldest
    env |= {"HOME": "/dev/null", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    assert done.stdout.split() == [fingerprint(), str(tmp_path / "fedtune/zeroth/kernels.py")]


def test_kernels_have_one_signature_and_compile_nothing_later() -> None:
    made = [
        kernel
        for kernel in vars(kernels).values()
        if hasattr(kernel, "signatures") and kernel.targetoptions["inline"] == "never"
    ]
    assert len(made) > 10
    assert all(len(kernel.signatures) == 1 and not kernel._can_compile for kernel in made)
    with pytest.raises(TypeError, match="No matching definition"):
        kernels.wht([1, 2])
