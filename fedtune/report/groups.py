"""Runs that differ by their seeds alone, drawn and counted as one."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence

from fedtune.overrides import flat
from fedtune.report.chart import LONGEST, Group, brief, number
from fedtune.report.curves import DOWN
from fedtune.report.read import RunData
from fedtune.report.tables import IDENTITY, Table, said
from fedtune.runtime.compare import differing
from fedtune.sinks.console import size
from fedtune.sinks.standing import duration

TRIAL = re.compile(r"\d+-seed-\d+")  # what a sweep calls its runs
KEYS = 3  # at most in the name of a group


def groups_of(runs: Sequence[RunData]) -> list[Group]:
    """In the order in which they were named."""
    alike: dict[str, list[RunData]] = {}
    for run in runs:
        alike.setdefault(json.dumps(recipe_of(run), sort_keys=True), []).append(run)
    members = list(alike.values())
    names = by_settings(members) or [brief(own[0].name) for own in members]
    return [
        Group(name + (f" ({len(own)} seeds)" if len(own) > 1 else ""), tuple(own))
        for name, own in zip(names, members, strict=True)
    ]


def recipe_of(run: RunData) -> dict[str, object]:
    return {key: value for key, value in run.config.items() if key not in (*IDENTITY, "seed")}


def by_settings(members: Sequence[Sequence[RunData]]) -> list[str]:
    """What tells the trials of a sweep apart, such as "rank 4, lr 0.01"; nothing of runs that somebody has
    named, or where it would be long."""
    if len(members) < 2 or not all(TRIAL.fullmatch(run.name) for own in members for run in own):
        return []
    keys = differing([flat(recipe_of(own[0])) for own in members])
    columns = [
        [f"{key.rpartition('.')[2]} {said(value)}" for value in values] for key, values in keys.items()
    ]
    names = [", ".join(parts) for parts in zip(*columns, strict=True)]
    fits = len(keys) <= KEYS and max(map(len, names)) <= LONGEST and len(set(names)) == len(names)
    return names if fits else []


def tested(group: Group) -> list[float]:
    """Scores on the test set, of the runs that have one."""
    return [run.federated for run in group.runs if run.federated is not None]


def held_out(group: Group) -> list[float]:
    """Last scores on rows that clients hold out, of the runs that have one."""
    return [run.quality()[-1][1] for run in group.runs if run.quality()]


def ranked(groups: Sequence[Group]) -> list[Group]:
    """Those that were scored, the best mean first: on held-out rows, so that test sets decide nothing and do
    not flatter; on the test set where some have no such rows."""
    judge = held_out if all(map(held_out, groups)) else tested
    sign = 1 if metric_of(groups) in DOWN else -1
    return sorted(filter(judge, groups), key=lambda group: sign * statistics.fmean(judge(group)))


def metric_of(groups: Sequence[Group]) -> str:
    return next((run.metric for group in groups for run in group.runs if run.metric), "score")


def summary(groups: Sequence[Group]) -> Table:
    """Means over seeds, with their standard deviation; the best first."""
    metric, first = metric_of(groups), ranked(groups)
    rows = []
    for group in (*first, *(one for one in groups if one not in first)):
        results = [run.result for run in group.runs if run.result]
        up = [float(one["up_bytes_per_client_round"]) for one in results]
        took = [float(one["seconds"]) for one in results]
        rows.append(
            [
                group.name,
                f"{len(results)} of {len(group.runs)}",
                around(held_out(group)),
                around(tested(group)),
                size(statistics.fmean(up)) if up else "",
                duration(statistics.fmean(took)) if took else "",
            ]
        )
    head = ("", "finished", f"{metric}, held out", f"{metric}, test set", "up, client and round", "time")
    return Table("means", "Means over seeds, best first", head, rows, "± one standard deviation over seeds.")


def around(values: Sequence[float]) -> str:
    """
    >>> around([0.5, 0.75]), around([0.5]), around([])
    ('0.625 ± 0.18', '0.5', '')
    """
    if not values:
        return ""
    apart = f" ± {number(statistics.stdev(values), 2)}" if len(values) > 1 else ""
    return number(statistics.fmean(values)) + apart


def overall(groups: Sequence[Group]) -> list[str]:
    """Many runs in two sentences."""
    runs = sum(len(group.runs) for group in groups)
    counted = f"{runs} runs of {len(groups)} recipes."
    if not (order := ranked(groups)):
        return [counted, "None of them was scored."]
    best, worst = (f"{one.name}, {in_words(one)}" for one in (order[0], order[-1]))
    return [counted, f"The best by {metric_of(groups)}: {best}. The worst: {worst}."]


def in_words(group: Group) -> str:
    known = ((held_out(group), "on held-out rows"), (tested(group), "on the test set"))
    return " and ".join(f"{around(values)} {where}" for values, where in known if values)
