"""Where the time went: by phase, and round by round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedtune.report.chart import Chart, Group, brief, legend_above, number, whole_rounds
from fedtune.report.picture import WIDTH, Palette
from fedtune.sinks.standing import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = 0.06  # share of the whole, from which a phase's time is written into its bar


def times(groups: Sequence[Group]) -> Iterator[Chart]:
    yield from phases(groups)
    yield from by_round(groups)


def phases(groups: Sequence[Group]) -> Iterator[Chart]:
    known = [
        (run.name, run.result["seconds_by_phase"])
        for group in groups
        for run in group.runs
        if run.result and run.result.get("seconds_by_phase")
    ]
    if not known:
        return
    names = list(dict.fromkeys(name for _, spent in known for name in spent))

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, 1.7 + 0.4 * len(known)))
        axes = figure.add_subplot()
        before = [0.0] * len(known)
        for place, name in enumerate(names):
            seconds = [spent.get(name, 0.0) for _, spent in known]
            drawn = axes.barh(
                [brief(run) for run, _ in known], seconds, left=before, height=0.6,
                color=palette.series[place % len(palette.series)], label=name,
            )  # fmt: skip
            most = max(sum(spent.values()) for _, spent in known)
            said = [duration(s) if s > BESIDE * most else "" for s in seconds]
            axes.bar_label(drawn, said, label_type="center", color=palette.paper, fontsize=9)
            before = [b + s for b, s in zip(before, seconds, strict=True)]
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        legend_above(figure, axes)
        return figure

    rows = [[name, *(f"{spent.get(name, 0.0):.1f}" for _, spent in known)] for name in names]
    rows.append(["in all", *(f"{sum(spent.values()):.1f}" for _, spent in known)])
    longest = [max(spent, key=lambda name: spent[name]) for _, spent in known]
    alt = "; ".join(
        f"{run}: {duration(sum(spent.values()))}, most of it {name} ({duration(spent[name])})"
        for (run, spent), name in zip(known, longest, strict=True)
    )
    yield Chart(
        "time", "Time by phase", f"{alt}.", draw, ("phase", *(run for run, _ in known)), rows,
        "Seconds of all processes that worked on the run; \"clients\" until their answers came, \"server\" "
        "the rest of a round.",
    )  # fmt: skip


def by_round(groups: Sequence[Group]) -> Iterator[Chart]:
    """Seconds of each round, of clients and of the server."""
    run = groups[0].runs[0]
    if len(groups) > 1 or len(run.rounds) < 2:
        return
    numbers = list(run.rounds)
    waited = [one.get("clients_seconds", 0.0) for one in run.rounds.values()]
    rest = [one["seconds"] - w for one, w in zip(run.rounds.values(), waited, strict=True)]

    def draw(palette: Palette) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        parts = {"clients": waited, "server": rest} if any(waited) else {"round": rest}
        axes.stackplot(
            numbers, list(parts.values()), labels=list(parts), colors=palette.series[:2], alpha=0.75
        )
        whole_rounds(axes)
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        legend_above(figure, axes)
        return figure

    rows = [[str(n), f"{w:.2f}", f"{r:.2f}"] for n, w, r in zip(numbers, waited, rest, strict=True)]
    slow = max(run.rounds, key=lambda n: run.rounds[n]["seconds"])
    yield Chart(
        "seconds", "Seconds of each round",
        f"The longest round is {slow}, with {number(run.rounds[slow]['seconds'], 3)} s.",
        draw, ("round", "clients", "server"), rows,
    )  # fmt: skip
