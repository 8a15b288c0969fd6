"""What tuning did to the model, as `fedtune eval --what` found it: a reliability diagram, who moves what,
what it knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.report.chart import Chart, brief, legend_above, number
from fedtune.report.clients import matrix
from fedtune.report.picture import Palette
from fedtune.report.read import RunData

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def effects(runs: Sequence[RunData]) -> Iterator[Chart]:
    for run in runs:
        for chart in (*reliability(run), *overlap(run), *knowledge(run)):
            yield replace(chart, title=f"{chart.title}, {run.name}") if len(runs) > 1 else chart


def reliability(run: RunData) -> Iterator[Chart]:
    """Accuracy by confidence, beside the diagonal on which both are the same."""
    found = (run.effects or {}).get("calibration")
    if not found:
        return
    lines: dict[str, dict[str, Any]] = {"tuned": found}
    if found.get("base"):
        lines["base model"] = found["base"]

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], ls=":", color=palette.series[2], label="as sure as right")
        for place, (name, one) in enumerate(lines.items()):
            points = [(part["confidence"], part["accuracy"]) for part in one["bins"]]
            axes.plot(*zip(*points, strict=True), marker="o", color=palette.series[place], label=name)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        legend_above(figure, axes)
        return figure

    said = "; ".join(f"{name} {number(one['ece'])}" for name, one in lines.items())
    rows = [
        [name, number(part["to"]), str(part["count"]), number(part["confidence"]), number(part["accuracy"])]
        for name, one in lines.items()
        for part in one["bins"]
    ]
    yield Chart(
        "reliability", "How sure the model is, and how often right", f"Expected calibration error: {said}.",
        draw, ("model", "confidence up to", found["of"], "mean confidence", "accuracy"), rows,
        f"On the test set, over {found['of']}; below the diagonal the model is surer than right.",
    )  # fmt: skip


def overlap(run: RunData) -> Iterator[Chart]:
    """How far clients moved the same weights."""
    found = (run.effects or {}).get("clients")
    if not found:
        return
    names = found["clients"]
    table = [[0.0 if value is None else value for value in row] for row in found["overlap"]]
    rows = [[brief(name), *map(number, row)] for name, row in zip(names, found["overlap"], strict=True)]
    yield Chart(
        "overlap", "Weights that clients moved most, in common",
        f"{len(names)} clients over {found['rounds']} rounds.",
        lambda palette: matrix(palette, table, names, names, "share in common", "client"),
        ("client", *map(brief, names)), rows,
        f"Of the {100 * found['share']:g} % of weights that each moved most; by chance it would be as much.",
    )  # fmt: skip


def knowledge(run: RunData) -> Iterator[Chart]:
    """How likely right answers are, before and after."""
    found = (run.effects or {}).get("knowledge")
    if not found:
        return
    before, after = sorts(found["base"]), sorts(found)
    names = list(after)

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        for place, (label, told) in enumerate((("base model", before), ("tuned", after))):
            at = [number + 0.4 * place - 0.2 for number in range(len(names))]
            bars = [told[name]["log_prob"] for name in names]
            axes.bar(at, bars, 0.36, color=palette.series[place], label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("log-probability of the answer (nats)")
        legend_above(figure, axes)
        return figure

    rows = [
        [name, *(number(told[name][key]) for key in ("log_prob", "right") for told in (before, after))]
        for name in names
    ]
    moved = [(name, number(before[name]["right"]), number(after[name]["right"])) for name in names]
    said = "; ".join(f"{name} {old} to {new}" for name, old, new in moved)
    yield Chart(
        "knowledge", "What the model knows", f"Right answers, before and after tuning: {said}.", draw,
        ("facts", "log-probability of base", "tuned", "right, of base", "tuned"), rows,
        "Asked in other words than in training; known facts were not taught.",
    )  # fmt: skip


def sorts(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each sort of facts by its name, updated ones as they were among them."""
    told: dict[str, dict[str, float]] = {}
    for name in ("new", "updated", "known"):
        if name in found:
            told[name] = found[name]
            if "as_before" in found[name]:
                told[f"{name}, as before"] = found[name]["as_before"]
    return told
