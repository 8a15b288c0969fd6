"""What happened round by round: quality, loss, bytes, figures of rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedtune.privacy.releases import UNITS
from fedtune.report.chart import Chart, Curve, Group, draw_band, factors, legend_above, number, whole_rounds
from fedtune.report.picture import Draw, Palette
from fedtune.report.read import RunData
from fedtune.sinks.console import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PARTS = 8  # lines of one figure that is told in parts; more are one band
RULES = 6  # charts of figures that rules and methods tell
NOUNS = {"example": "row"}  # what a unit is called elsewhere
DOWN = ("perplexity",)  # figures that are better when they are lower


def curves(groups: Sequence[Group]) -> Iterator[Chart]:
    """Every chart for which the runs have figures."""
    yield from quality(groups)
    yield from loss(groups)
    yield from traffic(groups)
    yield from privacy(groups)
    yield from rules(groups)


def lines(groups: Sequence[Group], read: str) -> list[tuple[Group, list[Curve]]]:
    """Of each group, its runs' curves of a figure of the rounds, where they have any."""
    return drawn((group, [run.curve(read) for run in group.runs]) for group in groups)


def drawn(found: Iterable[tuple[Group, Sequence[Curve]]]) -> list[tuple[Group, list[Curve]]]:
    """Without empty curves, and groups that have no others."""
    return [(group, [curve for curve in curves if curve]) for group, curves in found if any(curves)]


def table(groups: Sequence[tuple[Group, list[Curve]]]) -> list[list[str]]:
    """Rows of round, and of each group its mean with the range over seeds."""
    bands = [{x: rest for x, *rest in group.band(curves)} for group, curves in groups]
    rows = []
    for x in sorted({x for band in bands for x in band}):
        cells = []
        for band in bands:
            mean, low, high = band.get(x, (None, None, None))
            cells.append(number(mean) + (f" ({number(low)} to {number(high)})" if low != high else ""))
        rows.append([number(int(x)), *cells])
    return rows


def moves(groups: Sequence[tuple[Group, list[Curve]]], what: str) -> str:
    """A sentence for those who do not see the lines."""
    said = []
    for group, curves in groups:
        band = group.band(curves)
        (first, before, *_), (last, after, *_) = band[0], band[-1]
        name = f"{group.name}: " if len(groups) > 1 else ""
        said.append(
            f"{name}{what} from {number(before)} in round {first:g} to {number(after)} in round {last:g}"
        )
    return "; ".join(said) + "."


def quality(groups: Sequence[Group]) -> Iterator[Chart]:
    """Scores by round on held-out rows, beside what the federation is compared with."""
    shown = drawn((group, [run.quality() for run in group.runs]) for group in groups)
    only = groups[0] if len(groups) == 1 else None
    ends = [(group, finals(group.runs)) for group in groups]
    if not shown and not any(end for _, end in ends):
        return
    metric = next((run.metric for group in groups for run in group.runs if run.metric), "score")

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        for place, (group, curves) in enumerate(shown):
            draw_band(axes, palette, place, "held-out rows" if only else group.name, group.band(curves))
        for place, (group, points) in enumerate(ends):
            if points:
                colour = palette.series[place % len(palette.series)]
                xs, ys = zip(*points, strict=True)
                name = "test set" if only else "" if shown else group.name
                axes.scatter(xs, ys, marker="*", s=110, color=colour, zorder=3, label=name or None)
                bases = [run.lines["base model"] for run in group.runs if "base model" in run.lines]
                if bases and not shown:  # all that is known of the way: where it began and where it ended
                    begun = sum(bases) / len(bases)
                    axes.plot([0, xs[0]], [begun, ys[0]], color=colour, lw=1, alpha=0.6)
        for place, (name, values) in enumerate(compared(only).items() if only else ()):
            colour = palette.series[(place + 1) % len(palette.series)]
            axes.axhline(
                sum(values) / len(values), ls=("--", ":", "-.")[place % 3], color=colour, lw=1.6, label=name
            )
            if min(values) < max(values):
                axes.axhspan(min(values), max(values), color=colour, alpha=0.10, lw=0)
        whole_rounds(axes)
        axes.set_xlim(left=0)
        axes.set_ylabel(metric)
        legend_above(figure, axes)
        return figure

    rows = table(shown) if shown else []
    for group, points in ends:
        rows += [
            [f"{x:g} (test set)", *(number(y) if g is group else "" for g, _ in shown or ends)]
            for x, y in points
        ]
    for name, values in (compared(only) if only else {}).items():
        spread = f" ({number(min(values))} to {number(max(values))})" if min(values) < max(values) else ""
        rows.append([name, number(sum(values) / len(values)) + spread])
    alt = moves(shown, metric) if shown else ""
    alt += " On the test set: " + "; ".join(
        f"{group.name} {', '.join(number(y) for _, y in points)}" for group, points in ends if points
    )
    better = "lower is better" if metric in DOWN else "higher is better"
    about = f"{metric}: {better}. " + (
        "Bands: clients (local only) or seeds."
        if only
        else "Lines: held-out rows; stars: test set; bands: seeds."
    )
    yield Chart(
        "quality", f"{metric.capitalize()} by round", alt, draw,
        ("round", *(group.name for group, _ in shown or ends)), rows, about,
    )  # fmt: skip


def finals(runs: Sequence[RunData]) -> list[tuple[float, float]]:
    """(round that was kept, score of the federated model on the test set) of each finished run."""
    return [
        (float(run.result.get("kept_round") or run.result["rounds"]), run.federated)
        for run in runs
        if run.result and run.federated is not None
    ]


def compared(group: Group) -> dict[str, list[float]]:
    """Base, local only and centralised: the score of each run or, of a single run, of each client."""
    found: dict[str, list[float]] = {}
    for run in group.runs:
        for name, value in run.lines.items():
            found.setdefault(name, []).append(value)
    if len(group.runs) == 1 and len(each := list(group.runs[0].local_scores.values())) > 1:
        found["local only"] = each
    return found


def loss(groups: Sequence[Group]) -> Iterator[Chart]:
    if shown := lines(groups, "loss"):
        yield Chart(
            "loss", "Training loss by round", moves(shown, "training loss"),
            plain_lines(groups, shown, "training loss"), ("round", *(group.name for group, _ in shown)),
            table(shown), "Mean over a round's clients by their numbers of examples, in nats.",
        )  # fmt: skip


def plain_lines(groups: Sequence[Group], shown: Sequence[tuple[Group, list[Curve]]], label: str) -> Draw:
    """A line or band each; a group of runs has the same colour in all pictures."""

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        for place, (group, curves) in enumerate(shown):
            colour = groups.index(group) if group in groups else place
            draw_band(axes, palette, colour, group.name, group.band(curves))
        whole_rounds(axes)
        axes.set_ylabel(label)
        if len(shown) > 1 or len(groups) > 1:
            legend_above(figure, axes)
        return figure

    return draw


def traffic(groups: Sequence[Group]) -> Iterator[Chart]:
    """What quality cost in bytes: by held-out scores, by the training loss where there are none."""
    scored = any(run.quality() for group in groups for run in group.runs)
    metric = (
        next((run.metric for group in groups for run in group.runs if run.metric), "") if scored else "loss"
    )
    shown = []
    for group in groups:
        run = group.runs[0]
        total, values = run.traffic(), run.quality() if scored else run.curve("loss")
        points = [(total[n] / 2**20, value) for n, value in values if n in total]
        shown += [(group, points)] if points else []
    if not shown:
        return

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        for place, (group, points) in enumerate(shown):
            draw_band(axes, palette, place, group.name, [(x, y, y, y) for x, y in points])
        if len(shown) > 1 and max(p[-1][0] for _, p in shown) > 8 * min(p[-1][0] for _, p in shown):
            factors(axes)
        axes.set_xlabel("bytes up and down, all clients (MiB)")
        axes.set_ylabel(metric)
        if len(shown) > 1:
            legend_above(figure, axes)
        return figure

    ends = "; ".join(f"{g.name}: {size(p[-1][0] * 2**20)} for {metric} {number(p[-1][1])}" for g, p in shown)
    rows = [[group.name, size(x * 2**20), number(y)] for group, points in shown for x, y in points]
    yield Chart(
        "bytes", f"{metric.capitalize()} against bytes", f"{ends}.", draw, ("run", "bytes so far", metric),
        rows, "As counted on the wire, of all clients and rounds so far; of several seeds, the first.",
    )  # fmt: skip


def privacy(groups: Sequence[Group]) -> Iterator[Chart]:
    """Epsilon by round, of each unit that is hidden."""
    for unit, words in UNITS.items():
        if shown := drawn((group, [run.epsilon.get(unit, []) for run in group.runs]) for group in groups):
            title = f"Epsilon by round, of one {NOUNS.get(unit, unit)}"
            about = (
                f"Hidden: {words}. Of whom most was charged in the ledger, by Renyi divergences; the "
                "result has the smaller bound, by privacy loss distributions."
            )
            yield Chart(
                f"epsilon-{unit}", title, moves(shown, "epsilon"), plain_lines(groups, shown, "epsilon"),
                ("round", *(group.name for group, _ in shown)), table(shown), about,
            )  # fmt: skip


def rules(groups: Sequence[Group]) -> Iterator[Chart]:
    """Figures that rules, methods and steps tell of a round: drift, errors of aggregation, clipping."""
    names = dict.fromkeys(
        name
        for group in groups
        for run in group.runs
        for one in run.rounds.values()
        for name in one["metrics"]
    )
    by_prefix: dict[str, list[str]] = {}
    for name in names:
        if name != "loss":
            by_prefix.setdefault(name.partition("/")[0], []).append(name)
    for prefix, parts in list(by_prefix.items())[:RULES]:
        if len(groups) == 1 and len(parts) > 1:
            shown = in_parts(groups[0], prefix, parts)
        else:
            shown = lines(groups, parts[0])
        if shown:
            title = f"{prefix.replace('_', ' ').capitalize()} by round"
            yield Chart(
                f"rule-{slug(prefix)}", title, moves(shown, prefix), plain_lines(groups, shown, prefix),
                ("round", *(group.name for group, _ in shown)), table(shown),
                "As the rule, the method or the chain tells it of each round.",
            )  # fmt: skip


def in_parts(group: Group, prefix: str, parts: Sequence[str]) -> list[tuple[Group, list[Curve]]]:
    """A figure that is told for each module or expert: a line each or, of many, one band."""
    run = group.runs[0]
    if len(parts) > MOST_PARTS:
        name = f"{len(parts)} parts, mean and range"
        return [(Group(name, group.runs), [run.curve(part) for part in parts])]
    return [(Group(part.removeprefix(f"{prefix}/"), group.runs), [run.curve(part)]) for part in parts]


def slug(text: str) -> str:
    """
    >>> slug("Given / rank 4")
    'given-rank-4'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
