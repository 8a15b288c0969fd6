"""What a result depends on, as facts."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of fedtune, Python and the packages that decide about bytes; nothing is imported to find
    them."""
    from fedtune import __version__

    found = {"fedtune": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
