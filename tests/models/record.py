"""What was tried and what came out, stored: family -> task -> kind or method -> "works" or a sentence."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.models.families import FAMILIES, TASKS

Rows = dict[str, dict[str, str]]
FILE = Path(__file__).with_name("outcomes.json")
WORKS, FAULT = "works", "FAULT"
COLUMNS = (
    "lora",
    "bias",
    "adapter",
    "prompt",
    "prompt, deep",
    "prefix",
    "p-tuning",
    "ia3",
    "layernorm",
    "head",
    "full",
    "fedkseed",
    "sfprompt",
)
PACKAGES = ("torch", "transformers", "peft")


def tried_all(names: Sequence[str] = ()) -> Iterator[tuple[str, Rows]]:
    """Every family, or those named, with each of its tasks."""
    from tests.models.outcome import outcomes

    for name in names or FAMILIES:
        rows: Rows = {}
        for task in TASKS[FAMILIES[name].side]:
            with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows[task] = outcomes(name, task, Path(root))
        yield name, rows


def held() -> dict[str, Rows]:
    found: dict[str, Rows] = read()["families"]
    return found


def read() -> dict[str, dict]:  # type: ignore[type-arg]
    return json.loads(FILE.read_text()) if FILE.exists() else {"versions": {}, "families": {}}  # type: ignore[no-any-return]


def store(name: str, rows: Rows) -> None:
    """Add a family's outcomes, with the versions they were found with."""
    kept = read()["families"] | {name: rows}
    versions = {package: version(package).partition("+")[0] for package in PACKAGES}
    ordered = {family: kept[family] for family in FAMILIES if family in kept}
    FILE.write_text(
        json.dumps({"versions": versions, "families": ordered}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
