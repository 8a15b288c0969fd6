"""Clients into groups of those whose directions are alike: average linkage on cosines, their number by
silhouette, ids that stay.

As FedLEASE (Wang et al. 2025, arXiv:2509.15087): B factors tell tasks apart. numpy only; clients are taken
by ascending number, so that no order of answers matters.

>>> two = {0: np.float32([1, 0]), 1: np.float32([0, 1]), 2: np.float32([2, 0.1]), 3: np.float32([0.1, 1])}
>>> clusters(two, most=4, least=2)
[(0, 2), (1, 3)]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

SEPARATE = 0.1  # mean silhouette below which clients are not told apart: independent directions stay below it
Directions = Mapping[int, np.ndarray]  # client -> a sketch of where its rows move the model


def cosines(directions: Directions) -> np.ndarray:
    """(n, n), clients ascending; a direction of zeros is like nobody's."""
    rows = np.stack([directions[client].astype(np.float64) for client in sorted(directions)])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    same: np.ndarray = unit @ unit.T
    return same


def clusters(directions: Directions, most: int, least: int) -> list[tuple[int, ...]]:
    """At least two groups of at least `least` clients, at most `most`, in the order of their first members;
    [] where clients are not told apart. Clients of smaller groups are in none."""
    clients = sorted(directions)
    if len(clients) < 2 * least:
        return []
    apart = np.maximum(1.0 - cosines(directions), 0.0)
    best, found = SEPARATE, list[list[int]]()
    for groups in linkage(apart):
        kept = [group for group in groups if len(group) >= least]
        if 2 <= len(kept) <= most and (score := silhouette(apart, groups)) > best:
            best, found = score, kept
    return sorted(tuple(clients[place] for place in sorted(group)) for group in found)


def linkage(apart: np.ndarray) -> list[list[list[int]]]:
    """Average linkage (UPGMA): the partition after each merge. Of equally near pairs, the first is merged."""
    groups = [[place] for place in range(len(apart))]
    between = apart + np.diag(np.full(len(apart), np.inf))
    made = []
    while len(groups) > 2:
        one, two = sorted(divmod(int(np.argmin(np.round(between, 12))), len(groups)))
        sizes = len(groups[one]), len(groups[two])
        mean = (sizes[0] * between[one] + sizes[1] * between[two]) / sum(sizes)
        between[one], between[:, one] = mean, mean
        between[one, one] = np.inf
        between = np.delete(np.delete(between, two, axis=0), two, axis=1)
        groups[one] = groups[one] + groups.pop(two)
        made.append([list(group) for group in groups])
    return made


def silhouette(apart: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """The mean over all (Rousseeuw 1987); who is alone counts 0."""
    total = 0.0
    for number, group in enumerate(groups):
        for place in group if len(group) > 1 else ():
            own = apart[place, group].sum() / (len(group) - 1)
            near = min(
                apart[place, other].mean()
                for other_number, other in enumerate(groups)
                if other_number != number
            )
            total += (near - own) / max(own, near) if max(own, near) > 0 else 0.0
    return total / len(apart)


def matched(new: Sequence[Collection[int]], old: Mapping[str, Collection[int]]) -> list[str]:
    """For each new group the id of the old one with which it shares clients, so that all together share
    most; "" for a group that is new."""
    ids = sorted(old)
    shared = np.array([[len(set(group) & set(old[name])) for name in ids] for group in new], np.int64)
    chosen = assignment(shared.reshape(len(new), len(ids)))
    return [
        ids[column] if column is not None and shared[row, column] else "" for row, column in enumerate(chosen)
    ]


def assignment(gain: np.ndarray) -> list[int | None]:
    """A column for each row, none twice, of the greatest sum (the Hungarian method); None where columns run
    out.

    >>> assignment(np.array([[3, 2], [3, 0]]))
    [1, 0]
    """
    rows, columns = gain.shape
    size = max(rows, columns)
    cost = np.zeros((size + 1, size + 1))
    cost[1 : rows + 1, 1 : columns + 1] = -gain
    above, left, owner = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1, np.int64)
    for row in range(1, size + 1):
        owner[0], column = row, 0
        least, before, seen = (
            np.full(size + 1, np.inf),
            np.zeros(size + 1, np.int64),
            np.zeros(size + 1, bool),
        )
        while owner[column]:
            seen[column] = True
            reduced = cost[owner[column]] - above[owner[column]] - left
            closer = ~seen & (reduced < least)
            least[closer], before[closer] = reduced[closer], column
            step = int(np.argmin(np.where(seen, np.inf, least)[1:])) + 1
            delta = least[step]
            above[owner[seen]] += delta
            left[seen] -= delta
            least[~seen] -= delta
            column = step
        while column:
            owner[column], column = owner[before[column]], int(before[column])
    found: list[int | None] = [None] * rows
    for column in range(1, columns + 1):
        if 1 <= owner[column] <= rows:
            found[int(owner[column]) - 1] = column - 1
    return found


def nearest(direction: np.ndarray, groups: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
    """The cosine of a direction with the centre of each group's."""
    centres = {name: np.mean([unit(one) for one in group], axis=0) for name, group in groups.items()}
    return {name: float(unit(direction) @ unit(centre)) for name, centre in centres.items()}


def unit(direction: np.ndarray) -> np.ndarray:
    wide = direction.astype(np.float64)
    return wide / max(float(np.linalg.norm(wide)), 1e-30)
