"""The table of simulations/experts.py: static merges, whether the groups that were found are the tasks, and what the rows
say of routers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean

from fedtune.experts.cards import GENERAL, cards
from fedtune.runtime.expert_changes import merge
from fedtune.runtime.expert_library import library
from fedtune.runtime.expert_scores import halves_of, scored, seats
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.merge import Asked

BASE, GENERAL_ROW, OWN = "base", "general expert", "own expert"
FEDAVG, LOCAL, BEST_MERGE = "plain FedAvg, as much compute", "alone", "best static merge"
MERGES = {
    "mean": Asked("mean"),
    "task arithmetic, 0.3": Asked("task", {"lam": "0.3"}),
    "TIES, density 0.2": Asked("ties"),
    "LiNeS on the sum, 0.2 + 0.4": Asked(
        "lines", {"alpha": "0.2", "beta": "0.4", "of": "task", "lam": "1.0"}
    ),
}
Losses = Mapping[str, float]  # client -> loss
Rows = Mapping[str, Mapping[str, Losses]]  # row -> seed -> losses


def made_by_run(folder: RunFolder) -> list[str]:
    """A run's experts, but for the general one and merges."""
    found = cards(library(folder))
    return [name for name, card in found.items() if name != GENERAL and card.made_by == "run"]


def merged(folder: RunFolder) -> Iterator[tuple[str, Losses]]:
    """All experts of a library as one, on the general expert, by several rules; last the one that is best on
    the other half."""
    place, names = library(folder), made_by_run(folder)
    ids = {f"merged-{number}": rule for number, rule in enumerate(MERGES)}
    for name, rule in ids.items():
        if name not in cards(place):
            merge(folder, names, MERGES[rule], name)
    workspace, _, _ = installed(folder, "last", data=True)
    halves, found, chosen = halves_of(workspace), cards(place), dict[str, float]()
    told = dict[str, Losses]()
    for name, tunable in seats(workspace.base, place, {one: found[one] for one in (GENERAL, *ids)}):
        if rule := ids.get(name):
            first, second = (
                {client: scored(tunable, rows[half], workspace).loss for client, rows in halves.items()}
                for half in (0, 1)
            )
            chosen[rule], told[rule] = fmean(first.values()), second
    yield from ((f"merge: {rule}", losses) for rule, losses in told.items())
    yield BEST_MERGE, told[min(chosen, key=lambda rule: chosen[rule])]


def recovered(groups: Mapping[str, str]) -> float:
    """The adjusted Rand index of the groups that were found (client -> expert, "" for none: a group of its
    own) with the tasks, after which clients are called."""
    from sklearn.metrics import adjusted_rand_score

    clients = sorted(groups)
    found = [groups[client] or client for client in clients]
    return float(adjusted_rand_score([task_of(client) for client in clients], found))


def task_of(client: str) -> str:
    return client.rpartition("-")[0]


def by_task(losses: Losses) -> dict[str, float]:
    tasks = sorted({task_of(client) for client in losses})
    return {task: fmean(loss for client, loss in losses.items() if task_of(client) == task) for task in tasks}


def share(losses: Losses, start: Losses, end: Losses) -> float:
    """Of the way from one row's mean to another's."""
    begin, goal = fmean(start.values()), fmean(end.values())
    return (begin - fmean(losses.values())) / (begin - goal) if begin != goal else math.nan


def kept(losses: Losses, base: Losses, alone: Losses) -> dict[str, float]:
    """Of what a client's own adapter gained on the base, by client."""
    return {
        client: (base[client] - loss) / (base[client] - alone[client])
        for client, loss in losses.items()
        if alone[client] < base[client]
    }


def said_of(rows: Rows, name: str) -> dict[str, float]:
    """A row against the others, the mean over its seeds: share of the gap from general to own expert that it closes, tasks
    (of all) on which it is below plain FedAvg and below the best static merge, and clients (share) that keep 90 % of what
    their own adapter gained."""
    found: dict[str, list[float]] = {}
    for seed, losses in rows[name].items():
        other = {row: rows[row][seed] for row in (BASE, GENERAL_ROW, OWN, FEDAVG, LOCAL, BEST_MERGE)}
        mine = by_task(losses)

        def below(row: str, mine: Mapping[str, float] = mine, other: Mapping[str, Losses] = other) -> int:
            return sum(loss < by_task(other[row])[task] for task, loss in mine.items())

        keep = kept(losses, other[BASE], other[LOCAL])
        for key, value in {
            "gap": share(losses, other[GENERAL_ROW], other[OWN]),
            "below FedAvg": below(FEDAVG),
            "below merge": below(BEST_MERGE),
            "keep 90 %": fmean(one >= 0.9 for one in keep.values()),
        }.items():
            found.setdefault(key, []).append(value)
    return {key: fmean(values) for key, values in found.items()}
