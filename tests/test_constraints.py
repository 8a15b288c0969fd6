"""The two lists of what was tested name the same versions, and every one of the second has hashes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINNED.findall(text)}


def test_the_lock_is_of_the_same_versions() -> None:
    lock = (ROOT / "constraints.lock").read_text()
    assert pins(lock) == pins((ROOT / "constraints.txt").read_text())
    for entry in re.split(r"\n(?=[A-Za-z0-9])", lock)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


def test_the_floor_of_transformers_is_above_the_known_hole() -> None:
    """CVE-2026-4372: below 5.3 a model's settings could run code."""
    assert '"transformers>=5.3,<6"' in (ROOT / "pyproject.toml").read_text()
