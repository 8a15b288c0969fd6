"""docs/peers.md: the table that benchmarks/peers/compare.py --out has measured, if it was recorded."""

from __future__ import annotations

import json

from tests.regen.results import ROOT, block

PAGE, RECORDED = "docs/peers.md", "simulations/results/peers.json"


def generate() -> dict[str, str]:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    return {PAGE: block(text, "measured", "\n".join(table()))}


def table() -> list[str]:
    if not (ROOT / RECORDED).exists():
        return ["No table was recorded yet on a machine that was quiet enough for one."]
    kept = json.loads((ROOT / RECORDED).read_text(encoding="utf-8"))
    titles = list(dict.fromkeys(title for cells in kept["rows"].values() for title in cells))
    lines = [f"{kept['recipe']}; {kept['hardware']}.", "", "| | " + " | ".join(titles) + " |"]
    lines.append("|" + "---|" * (len(titles) + 1))
    for label, cells in kept["rows"].items():
        lines.append("| " + " | ".join([label, *(shown(cells.get(title)) for title in titles)]) + " |")
    return lines


def shown(value: object) -> str:
    """Three digits of what is small, none behind the point of what is large."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
