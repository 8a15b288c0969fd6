"""Which clients are asked in a round: drawn without replacement with the run's seed, so that a resumed run asks the same."""

from __future__ import annotations

from fedtune.config import SamplingSettings
from fedtune.errors import FedtuneError
from fedtune.rng import stream


def sample(settings: SamplingSettings, clients: int, seed: int, number: int) -> tuple[int, ...]:
    """Ids of round `number`'s members, ascending. Raises C104 where more are wanted than there are."""
    if settings.count > clients:
        found = f"sampling.count = {settings.count} of {clients} clients"
        raise FedtuneError("C104", found, "at most all of them", "lower it")
    count = settings.count or max(1, round(settings.fraction * clients))
    if count >= clients:
        return tuple(range(clients))
    return tuple(sorted(stream("sampling", seed, number).choice(clients, count, replace=False).tolist()))
