"""What a result depends on, as facts."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy")


def cores() -> int:
    """Cores that this process may use, where the system can tell: the threads of torch, on which bits may depend."""
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
