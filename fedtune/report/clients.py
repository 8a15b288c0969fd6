"""Who took part: scores client by client, rows and labels of each, who is slow, what experts are good for."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.report.chart import Chart, Group, brief, number
from fedtune.report.picture import WIDTH, Palette
from fedtune.report.read import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS = 24  # clients beside whom there is room for a name; more are shown as a spread
CELLS = 400  # of a matrix in which numbers can be read
DATA_COLOURS = "cividis"  # for numbers: seen by all eyes, and as well on dark as on light


def clients(groups: Sequence[Group]) -> Iterator[Chart]:
    runs = [run for group in groups for run in group.runs]
    yield from scores(runs)
    for chart in (*partition(runs[0]), *pace(runs[0]), *experts(runs[0])):
        yield replace(chart, title=f"{chart.title}, {runs[0].name}") if len(runs) > 1 else chart


def own_scores(run: RunData) -> dict[str, float]:
    """Client -> score of the federated model on the rows that it held out."""
    known = ((run.result or {}).get("phases") or {}).get("clients_metric") or {}
    return {name: float(one["metric"]) for name, one in known.items() if one and one["metric"] is not None}


def scores(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Bars of one run with few clients; the spread of many, or of several runs."""
    known = [(run, values) for run in runs if (values := own_scores(run))]
    if not known:
        return
    metric = known[0][0].metric
    rows = [
        [*([run.name] if len(known) > 1 else []), brief(name), number(value), *local_of(run, name)]
        for run, values in known
        for name, value in sorted(values.items(), key=lambda one: one[1])
    ]
    head = (*(("run",) if len(known) > 1 else ()), "client", metric)
    head += ("by itself, on the test set",) if len(rows[0]) > len(head) else ()
    said = "; ".join(
        f"{run.name}: mean {number(statistics.fmean(values.values()))}, from "
        f"{number(min(values.values()))} to {number(max(values.values()))}"
        for run, values in known
    )
    values, few = known[0][1], len(known) == 1 and len(known[0][1]) <= BARS

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        if few:
            return bars(palette, dict(sorted(values.items(), key=lambda one: one[1])), metric)
        figure = Figure(figsize=(WIDTH, max(3.1, 0.3 * len(known) + 0.9)))
        axes = figure.add_subplot()
        spread(axes, palette, [(run.name, list(one.values())) for run, one in known])
        axes.set_xlabel(metric)
        return figure

    yield Chart(
        "clients", f"{metric.capitalize()} client by client", f"{said}.", draw, head, rows,
        "The federated model on the rows that each client held out.",
    )  # fmt: skip


def local_of(run: RunData, name: str) -> list[str]:
    """The score of a client that trained by itself, where that was measured."""
    found = {number_of(run, key): value for key, value in run.local_scores.items()}
    return [number(found.get(name))] if found else []


def number_of(run: RunData, key: str) -> str:
    """The client's name behind the number in "local:3" or "local:3:seed2"."""
    place = key.partition(":")[0]
    names = run.clients
    return names[int(place)] if place.isdigit() and int(place) < len(names) else place


def bars(palette: Palette, values: dict[str, float], label: str) -> Figure:
    """Horizontal bars with their numbers and, dashed, the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, max(1.6, 0.28 * len(values) + 0.9)))
    axes = figure.add_subplot()
    drawn = axes.barh([brief(name) for name in values], list(values.values()), color=palette.series[0])
    said = [number(value, 3) for value in values.values()]
    axes.bar_label(drawn, said, label_type="center", color=palette.paper, fontsize=9.5)
    axes.axvline(statistics.fmean(values.values()), ls="--", color=palette.series[1], lw=1.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{label} (dashed: mean)")
    return figure


def spread(axes: Axes, palette: Palette, named: Sequence[tuple[str, list[float]]]) -> None:
    """A row of points for each run, with quartiles."""
    axes.boxplot(
        [values for _, values in named], orientation="horizontal", widths=0.5, showfliers=False,
        boxprops={"color": palette.series[0]}, medianprops={"color": palette.series[1], "lw": 2},
        whiskerprops={"color": palette.series[0]}, capprops={"color": palette.series[0]},
    )  # fmt: skip
    for row, (_, values) in enumerate(named, 1):
        shift = [row + 0.17 * ((place % 5) - 2) / 2 for place in range(len(values))]
        axes.scatter(values, shift, s=12, color=palette.series[0], alpha=0.6, zorder=3)
    axes.set_yticks(range(1, len(named) + 1), [brief(name) for name, _ in named])
    axes.grid(axis="y", visible=False)


def partition(run: RunData) -> Iterator[Chart]:
    """Rows of each client, by label where rows have labels."""
    listed = (run.partition or {}).get("clients") or []
    listed = [one for one in listed if one["train"] or one["held_out"]]
    if not listed:
        return
    labels = list(dict.fromkeys(label for one in listed for label in one["labels"]))
    order = [label for label in (run.partition or {}).get("labels", ()) if label in labels]
    labels = order + [label for label in labels if label not in order]
    rows = [
        [
            brief(one["name"]),
            str(one["train"]),
            str(one["held_out"]),
            *(str(one["labels"].get(x, 0)) for x in labels),
        ]
        for one in listed
    ]
    sizes = [one["train"] for one in listed]
    alt = f"{len(listed)} clients with {min(sizes):,} to {max(sizes):,} rows to train on"
    alt += f", of {len(labels)} labels." if labels else "."

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        if not labels:
            if len(listed) <= BARS:
                return bars(palette, {one["name"]: float(one["train"]) for one in listed}, "rows to train on")
            figure = Figure()
            axes = figure.add_subplot()
            axes.hist(sizes, bins=min(30, len(set(sizes))), color=palette.series[0])
            axes.set_xlabel("rows to train on")
            axes.set_ylabel("clients")
            return figure
        table = [[one["labels"].get(label, 0) for label in labels] for one in listed]
        return matrix(palette, table, [one["name"] for one in listed], labels, "rows", "label")

    yield Chart(
        "partition", "Rows of each client" + (" by label" if labels else ""), alt, draw,
        ("client", "to train on", "held out", *map(brief, labels)), rows,
        "As the run divided them; rows of real sites are known to the sites alone.",
    )  # fmt: skip


def matrix(
    palette: Palette, table: Sequence[Sequence[float]], down: Sequence[str], across: Sequence[str],
    label: str, what: str,
) -> Figure:  # fmt: skip
    """A heat map, with its numbers where they can be read and names where there is room."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, min(7.5, max(2.2, 0.26 * len(down) + 1.4))))
    axes = figure.add_subplot()
    values = np.asarray(table, float)
    image = axes.imshow(values, aspect="auto", cmap=DATA_COLOURS, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    if len(down) <= 2 * BARS:
        axes.set_yticks(range(len(down)), [brief(name, 18) for name in down])
    else:
        axes.set_ylabel("client")
    if len(across) <= BARS:
        axes.set_xticks(range(len(across)), [brief(name, 14) for name in across], rotation=45, ha="right")
    else:
        axes.set_xlabel(what)
    if values.size <= CELLS and len(across) <= 12:
        middle = (values.max() + values.min()) / 2
        for (row, column), value in np.ndenumerate(values):
            shade = "#111111" if value > middle else "#fafafa"
            axes.text(
                column, row, number(float(value), 3), ha="center", va="center", color=shade, fontsize=8.5
            )
    return figure


def pace(run: RunData) -> Iterator[Chart]:
    """Seconds that clients took for a round: the median, the slowest first."""
    took: dict[str, list[float]] = {}
    for (_, name), one in run.answers.items():
        if one.get("seconds"):
            took.setdefault(name, []).append(one["seconds"])
    if not took:
        return
    slowest = dict(sorted(((n, statistics.median(s)) for n, s in took.items()), key=lambda one: -one[1]))
    shown = dict(list(slowest.items())[:BARS])
    rows = [
        [brief(name), f"{median:.2f}", f"{max(took[name]):.2f}", str(len(took[name]))]
        for name, median in slowest.items()
    ]
    middle = statistics.median(slowest.values())
    name, most = next(iter(slowest.items()))
    yield Chart(
        "pace", "Seconds of a client for one round",
        f"The slowest, {brief(name)}, takes {most:.2f} s; half of the clients take less than {middle:.2f} s.",
        lambda palette: bars(palette, dict(reversed(shown.items())), "median seconds"),
        ("client", "median seconds", "longest", "rounds"), rows,
        "Of its own work in a simulation; of a real site, from the question to the answer."
        + (f" The slowest {BARS} of {len(slowest)}." if len(slowest) > BARS else ""),
    )  # fmt: skip


def left_out(run: RunData) -> list[list[str]]:
    """Client, code, how often, in which rounds, and what was last said."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (_, name), one in sorted(run.left_out.items()):
        found.setdefault((name, str(one.get("code", ""))), []).append(one)
    return [
        [name, code, str(len(events)), in_short([one["round"] for one in events]), str(events[-1]["text"])]
        for (name, code), events in found.items()
    ]


def in_short(numbers: Sequence[int]) -> str:
    """
    >>> in_short([1, 2, 3, 7]), in_short([])
    ('1 to 3, 7', '')
    """
    parts: list[list[int]] = []
    for one in sorted(numbers):
        if parts and one == parts[-1][1] + 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in parts)


def share_of_rounds(run: RunData) -> Counter[str]:
    """Client -> rounds in which its answer counted."""
    return Counter(name for _, name in run.answers)


def experts(run: RunData) -> Iterator[Chart]:
    """Losses of every expert on every client's held-out rows, as `fedtune experts eval` found them."""
    losses = (run.experts or {}).get("losses") or {}
    if not losses:
        return
    names = list(losses)
    people = list(next(iter(losses.values())))
    table = [[losses[name][client] for name in names] for client in people]
    rows = [
        [brief(client), *(number(value) for value in row)] for client, row in zip(people, table, strict=True)
    ]
    best = Counter(min(names, key=lambda name: losses[name][client]) for client in people)
    often = ", ".join(f"{name} {count} times" for name, count in best.most_common())
    yield Chart(
        "experts", "Loss of each expert at each client", f"The best for its client: {often}.",
        lambda palette: matrix(palette, table, people, names, "loss in nats", "expert"),
        ("client", *map(brief, names)), rows, "On rows that the clients held out; lower is better.",
    )  # fmt: skip
