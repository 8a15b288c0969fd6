"""Which clients move the same weights: the overlap of those that each moves most, where answers are seen.

The mask of the most moved weights localises what a client learns (Panigrahi et al. 2023, "Task-Specific Skill
Localization in Fine-tuned Language Models", arXiv:2302.06600); two clients whose masks overlap learn alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.runtime.journal import Journal

SHARE = 0.01  # of all weights, those that a client moves most
OVERLAPS = "overlaps:"  # how the journal names those of a round


def most_moved(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Places of the most moved weights, in the order of names: (k,) with k a hundredth of all, at least 1."""
    flat = np.concatenate([np.abs(tensors[name]).ravel() for name in sorted(tensors)])
    count = max(1, round(SHARE * flat.size))
    return np.sort(np.argpartition(flat, flat.size - count)[flat.size - count :])


def pairs(places: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Client -> other client -> share of the one's most moved weights that are the other's, too."""
    return {
        one: {
            other: len(np.intersect1d(mine, theirs, assume_unique=True)) / max(len(mine), len(theirs))
            for other, theirs in places.items()
        }
        for one, mine in places.items()
    }


def overlaps(journal: Journal) -> dict[str, Any]:
    """Means over the rounds in which both took part, as a table. Raises C104 where no round noted any."""
    told = journal.phases(OVERLAPS)
    if not told:
        raise FedtuneError(
            "C104",
            "overlaps of a run that noted none",
            "watch.influence = true, and answers that are seen singly",
            "run it with --set watch.influence=true, or leave clients out of --what",
        )
    seen: dict[tuple[str, str], list[float]] = {}
    for by_client in told.values():
        for one, others in by_client.items():
            for other, share in others.items():
                seen.setdefault((one, other), []).append(share)
    names = sorted({one for one, _ in seen})
    table = [
        [sum(found) / len(found) if (found := seen.get((one, other))) else None for other in names]
        for one in names
    ]
    return {"clients": names, "rounds": len(told), "share": SHARE, "overlap": table}
