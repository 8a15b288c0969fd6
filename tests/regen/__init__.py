"""Files that are generated and committed: `python -m tests.regen` writes them, `--check` names those that are
stale (exit 1).

A generator is a function without arguments that gives {path from the repository's root: text}. Adding one is
one line in
GENERATORS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.regen import (
    api,
    architecture,
    choose,
    cli,
    decisions,
    docs,
    experts,
    golden,
    models,
    peers,
    pictures,
    rates,
    results,
    stubs,
    tuning,
)

ROOT = Path(__file__).resolve().parents[2]
GENERATORS: dict[str, Callable[[], dict[str, str]]] = {
    "stubs": stubs.generate,
    "golden": golden.generate,
    "errors": docs.errors,
    "recipe": docs.recipe,
    "schema": docs.schema,
    "rates": rates.generate,
    "cli": cli.generate,
    "api": api.generate,
    "decisions": decisions.generate,
    "pictures": pictures.generate,
    "choose": choose.generate,
    "tuning": tuning.generate,
    "peers": peers.generate,
    "architecture": architecture.generate,
    "experts": experts.generate,
    "results": results.generate,
    "models": models.generate,
}


def stale(names: Sequence[str] = ()) -> dict[str, str]:
    """Path -> right text of every generated file that does not hold it; all generators, or those named."""
    wanted = [GENERATORS[name]() for name in names or GENERATORS]
    return {path: text for files in wanted for path, text in files.items() if not held(path, text)}


def held(path: str, text: str) -> bool:
    """Whether the file holds the text; versions of the stub generator are no difference."""
    file = ROOT / path
    return file.exists() and stubs.without_versions(
        file.read_text(encoding="utf-8")
    ) == stubs.without_versions(text)


def write(files: dict[str, str]) -> None:
    for path, text in files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
