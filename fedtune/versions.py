"""What a result depends on, as facts."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy")


def cores() -> int:
    """Threads that torch gets by default: OMP_NUM_THREADS where it is set, else the cores that this process may use. Bits may depend on them."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def versions() -> dict[str, str]:
    """Versions of fedtune, Python and the packages that decide about bytes; nothing is imported to find them."""
    from fedtune import __version__

    found = {"fedtune": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
