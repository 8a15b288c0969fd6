"""What packages bring with them, by the metadata of what is installed here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

CORE = ("torch", "transformers", "peft")  # what anybody who tunes a model has


def called(name: str) -> str:
    return name.lower().replace("_", "-")


def brought(requirements: Iterable[str]) -> set[str]:
    """All packages that come with some, themselves included."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        one = waiting.pop()
        if (called(one.name), frozenset(one.extras)) in seen:
            continue
        try:
            needs = distribution(one.name).requires or []
        except PackageNotFoundError:  # of another system
            continue
        seen.add((called(one.name), frozenset(one.extras)))
        waiting += [
            known
            for known in map(Requirement, needs)
            if known.marker is None
            or any(known.marker.evaluate({"extra": name}) for name in {"", *one.extras})
        ]
    return {name for name, _ in seen}


def size_of(packages: Iterable[str]) -> int:
    """Bytes of their files."""
    files = [file for name in packages for file in distribution(name).files or ()]
    return sum(path.stat().st_size for file in files if (path := file.locate()).exists())
