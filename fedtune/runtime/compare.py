"""Runs beside one another: what differs in their recipes, and in what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.overrides import flat
from fedtune.runtime.folder import existing

FIGURES = (  # of result.json, in the order in which people ask
    "metric",
    "base",
    "local",
    "federated",
    "federated_last",
    "centralised",
    "rounds",
    "kept_round",
    "clients",
    "left_out",
    "up_bytes_per_client_round",
    "down_bytes_per_client_round",
    "seconds",
    "peak_rss_bytes",
    "state_sha256",
)
NOTHING = "-"


def compared(folders: Sequence[Path]) -> dict[str, Any]:
    """runs: their names; recipe: key -> a value of each run, where they differ; result: figure -> a value of
    each, None where a run has none (yet). Raises R402."""
    runs = [existing(folder) for folder in folders]
    recipes = [flat(run.read_json("config.json")) for run in runs]
    results = [run.read_json("result.json") if (run.path / "result.json").exists() else {} for run in runs]
    figures = dict.fromkeys(
        [*FIGURES, *(f"figures.{name}" for one in results for name in flat(one.get("figures") or {}))]
    )
    flattened = [flat({**one, "figures": one.get("figures") or {}}) for one in results]
    values = {name: [one.get(name) for one in flattened] for name in figures}
    return {
        "runs": [run.path.name for run in runs],
        "recipe": differing(recipes),
        "result": {name: found for name, found in values.items() if any(one is not None for one in found)},
    }


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys that not all recipes have with the same value; None where a recipe does not have it."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    found = {key: [recipe.get(key) for recipe in recipes] for key in keys if key != "name"}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def table(content: Mapping[str, Any]) -> list[str]:
    """The comparison as lines of text, one column a run."""
    rows = [["", *content["runs"]]]
    for title in ("recipe", "result"):
        rows += [[f"{title}:", *([""] * len(content["runs"]))]]
        rows += [[f"  {key}", *map(shown, values)] for key, values in content[title].items()]
        if not content[title]:
            rows += [
                ["  (no difference)" if title == "recipe" else "  (none yet)", *([""] * len(content["runs"]))]
            ]
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True)).rstrip() for row in rows
    ]


def shown(value: Any) -> str:
    """A value in a column; of a hash, its beginning."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text[:12] if len(text) == 64 else text if len(text) <= 40 else text[:37] + "..."
