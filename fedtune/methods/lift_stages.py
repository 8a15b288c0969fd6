"""What FedPEFT does for an adapter whose support is chosen in stages: every question that trains a later
stage tells which positions the coordinator found for it, and a client that finds others is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedtune.errors import ClientFailed
from fedtune.model.adapters import Adapter
from fedtune.model.adapters.lift import Lift
from fedtune.types import Tensors

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

PRINT = "support.residual_print"  # beside what is given, and no part of an answer
SIZE = 16  # of a SHA-256, in numbers of 16 bits


def print_entries(adapter: Adapter | None) -> list[tuple[str, tuple[int, ...]]]:
    """What a question carries beside the adapter: names and shapes."""
    return [(PRINT, (SIZE,))] if isinstance(adapter, Lift) and adapter.stages > 1 else []


def told_print(tunable: TunableModel, number: int) -> dict[str, np.ndarray]:
    """The print of a round's stage, where the tunable model has that round's state; {} for adapters of one
    stage."""
    adapter = tunable.settings
    if not isinstance(adapter, Lift) or adapter.stages == 1:
        return {}
    from fedtune.model.sparse_stages import support_print

    return {PRINT: support_print(tunable.net, adapter.stage(number))}


def without_print(given: Tensors) -> dict[str, np.ndarray]:
    return {name: value for name, value in given.items() if name != PRINT}


def check_print(tunable: TunableModel, given: Tensors, number: int) -> None:
    """Raises ClientFailed W604 where this client chose other positions; the state is in the tunable model."""
    if PRINT in given and not np.array_equal(told_print(tunable, number)[PRINT], given[PRINT]):
        raise ClientFailed(
            "W604",
            f"other weights to train in round {number} at this client than at the coordinator",
            "the same, which follow from the base and the state",
            "use the same LAPACK and processor, or set method.adapter.stages = 1",
        )
