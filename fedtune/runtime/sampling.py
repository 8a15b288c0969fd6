"""Which clients are asked in a round: drawn without replacement with the run's seed, so that a resumed run asks the same."""

from __future__ import annotations

from fedtune.config import SamplingSettings
from fedtune.rng import stream


def sample(settings: SamplingSettings, clients: int, seed: int, number: int) -> tuple[int, ...]:
    """Ids of round `number`'s members, ascending."""
    count = settings.count or max(1, round(settings.fraction * clients))
    if count >= clients:
        return tuple(range(clients))
    return tuple(sorted(stream("sampling", seed, number).choice(clients, count, replace=False).tolist()))
