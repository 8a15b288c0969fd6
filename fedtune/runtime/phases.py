"""Where the time of a run goes: seconds by phase, kept in the run's clock, and so over crashes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

BEFORE = "phase: "  # of a phase's name among the clock's entries
LOADING, TOKENISING, CLIENTS, SERVER, SCORING, FINAL = PHASES = (
    "loading data and model",
    "tokenising",
    "clients",
    "server",
    "scoring",
    "final scores and comparisons",
)


@contextmanager
def spent(clock: dict[str, float], phase: str, since: float | None = None) -> Iterator[None]:
    """The time of the block counts as this phase's; it began at `since`, in seconds since the epoch (None:
    now)."""
    since = time.time() if since is None else since
    try:
        yield
    finally:
        add(clock, phase, time.time() - since)


def add(clock: dict[str, float], phase: str, seconds: float) -> None:
    clock[BEFORE + phase] = clock.get(BEFORE + phase, 0.0) + seconds


def by_phase(clock: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase and, last, of what is in none.

    >>> by_phase({"seconds": 9.0, "phase: clients": 7.0, "phase: tokenising": 1.5})
    {'tokenising': 1.5, 'clients': 7.0, 'other': 0.5}
    """
    known = {phase: clock[BEFORE + phase] for phase in PHASES if BEFORE + phase in clock}
    return {**known, "other": max(0.0, clock["seconds"] - sum(known.values()))}
