"""docs/experts.md: the table that simulations/experts.py has recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tests.regen.results import ROOT, block, figure

PAGE, RECORDED = "docs/experts.md", "simulations/results/experts.json"
Losses = Mapping[str, float]  # client -> loss
BEATEN = ("general expert", "best static merge", "plain FedAvg, as much compute")
COLUMNS = (
    "loss",
    "of the gap",
    *(f"tasks below: {name}" for name in BEATEN),
    "clients that keep 90 % of what their own adapter gained",
)


def generate() -> dict[str, str]:
    return {PAGE: block((ROOT / PAGE).read_text(encoding="utf-8"), "experts", "\n".join(table()))}


def table() -> list[str]:
    if not (ROOT / RECORDED).exists():
        return []
    kept = json.loads((ROOT / RECORDED).read_text(encoding="utf-8"))
    rows, found = kept["rows"], kept["found"]
    lines = [f"| | {' | '.join(COLUMNS)} | seeds |", "|" + "---|" * (len(COLUMNS) + 2)]
    for name, seeds in rows.items():
        cells = [
            cells_of(losses, {row: other[seed] for row, other in rows.items() if seed in other})
            for seed, losses in seeds.items()
        ]
        shown = [
            said([one[column] for one in cells if one[column] is not None]) for column in range(len(COLUMNS))
        ]
        lines.append(f"| {name} | {' | '.join(shown)} | {len(seeds)} |")
    index = said([one["adjusted Rand index"] for one in found.values()])
    experts = said([one["experts"] for one in found.values()])
    return [
        *lines,
        "",
        f"Experts that were found: {experts}; adjusted Rand index {index}. {kept['hardware']}.",
    ]


def said(values: list[float]) -> str:
    """The mean and, of several seeds, the range."""
    if not values:
        return ""
    return figure(values) if len(values) > 1 else f"{values[0]:.3f}".removesuffix(".000")


def cells_of(losses: Losses, others: Mapping[str, Losses]) -> list[Any]:
    """None where the row to compare with was not recorded."""
    base, own, general = others["base"], others["own expert"], others["general expert"]
    alone = others.get("alone")
    start, end, mine = fmean(general.values()), fmean(own.values()), by_task(losses)
    return [
        fmean(losses.values()),
        (start - fmean(losses.values())) / (start - end),
        *(
            sum(loss < by_task(others[name])[task] for task, loss in mine.items()) if name in others else None
            for name in BEATEN
        ),
        alone and sum(base[c] - losses[c] >= 0.9 * (base[c] - alone[c]) for c in losses),
    ]


def by_task(losses: Losses) -> dict[str, float]:
    tasks = {client.rpartition("-")[0] for client in losses}
    return {
        task: fmean(loss for client, loss in losses.items() if client.rpartition("-")[0] == task)
        for task in sorted(tasks)
    }
