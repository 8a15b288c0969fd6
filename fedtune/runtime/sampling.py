"""Which clients are asked in a round: drawn without replacement with the run's seed, so that a resumed run
asks the same."""

from __future__ import annotations

import math

from fedtune.config import SamplingSettings
from fedtune.errors import FedtuneError
from fedtune.rng import stream


def wanted(settings: SamplingSettings, clients: int) -> int:
    """How many answers a round is for."""
    return settings.count or max(1, round(settings.fraction * clients))


def sample(
    settings: SamplingSettings, clients: int, seed: int, number: int, over: float = 0.0
) -> tuple[int, ...]:
    """Ids of round `number`'s members, ascending, and a share `over` more. Raises C104 where more are wanted
    than there are."""
    if settings.count > clients:
        found = f"sampling.count = {settings.count} of {clients} clients"
        raise FedtuneError("C104", found, "at most that many clients", "lower sampling.count")
    count = math.ceil(wanted(settings, clients) * (1 + over))
    if count >= clients:
        return tuple(range(clients))
    return tuple(sorted(stream("sampling", seed, number).choice(clients, count, replace=False).tolist()))
