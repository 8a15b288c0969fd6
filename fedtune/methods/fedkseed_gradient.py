"""A client of FedKSeed that can afford gradients: it trains as usual, and sends the coordinates of its update
along the same directions that others walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.methods.fedkseed_settings import FedKSeedSettings
from fedtune.methods.fedkseed_walk import Walk, diverged

if TYPE_CHECKING:
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel
    from fedtune.zeroth import Pool


def takes_gradients(s: FedKSeedSettings, client: int, tunable: TunableModel, data: Encoded) -> bool:
    """Whether a client trains with gradients: as declared, or by the memory that is declared or there."""
    if s.estimators:
        return s.estimators[client % len(s.estimators)] == "gradient"
    if s.estimator != "auto":
        return s.estimator == "gradient"
    from fedtune.model.forward import room_for
    from fedtune.model.memory_plan import plan_of, training_bytes

    room = s.memory[client % len(s.memory)] * 2**30 if s.memory else room_for(tunable)
    longest = max((data.length(i) for i in range(len(data))), default=1)
    return sum(training_bytes(plan_of(tunable), s.train, longest).values()) <= room


def projected(
    tunable: TunableModel,
    data: Encoded,
    pool: Pool,
    seed: int,
    s: FedKSeedSettings,
    unit: float,
    most: int,
    progress: tuple[int, int],
    again: Callable[[Mapping[str, Any]], None],
) -> Walk:
    """Train with gradients from where the model stands; send the update's coordinates, gain / K * (z_k .
    update), in units of lr * scalar, none beyond `most`. The model then holds nothing that means anything.

    again  writes the values that the model stands at into tensors, under their names
    """
    from fedtune.model.fit import fit
    from fedtune.model.initial_values import put_update
    from fedtune.zeroth import project

    report = fit(tunable, data, s.train, seed, progress=progress)
    put_update(tunable, again)
    try:
        coordinates = project(tunable.named, pool) * (float(s.gain) / (s.size * float(s.lr) * unit))
    except FedtuneError as error:  # W607: a value that is not finite
        raise diverged(report.loss, report.steps, "method.train.lr") from error
    scalars = np.rint(np.clip(coordinates, -most, most)).astype(np.int64)
    return Walk(scalars, report.loss, report.loss, float((np.abs(coordinates) > most).mean()))
