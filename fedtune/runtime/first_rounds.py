"""Whether a run learns at all: said after its first rounds, while it costs little to begin again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.events import Noted

if TYPE_CHECKING:
    from fedtune.runtime.run import Run

LOOKED_AT = 3  # rounds after which the first loss is compared
FALLS = 0.98  # what the loss has to fall below, as a share of the first: less is the batches' noise
RISES = 1.05
LEARNED = 0.5  # of a guess among the classes: below that there is something to lose before the first round


def say_if_not_learning(work: Run) -> None:
    """A note after the first rounds, where the training loss has not fallen in them."""
    from fedtune.hf.config import width_of

    method, base = work.recipe.method, work.workspace.base
    losses = [row.metrics.get("loss", math.nan) for row in work.journal.rounds()]
    fitting = method.fitting_rates(width_of(base.net.config))
    if said := not_learning(losses, len(base.labels), method.rates, fitting):
        work.tell(Noted(said))


def not_learning(losses: Sequence[float], classes: int, rates: str, fitting: str) -> str:
    """One sentence where the training loss has not fallen in the first rounds, else "".

    losses   mean training loss of each round so far
    classes  of the task; 0 for a language model
    rates    the run's learning rates, in words
    fitting  what "auto" would take, in words; "" where the method does not say
    """
    if len(losses) != LOOKED_AT or not all(map(math.isfinite, losses)):
        return ""
    first, last = losses[0], losses[-1]
    if last < FALLS * first or (classes > 1 and last < LEARNED * math.log(classes)):
        return ""
    size = "high" if last > RISES * first else "low"
    advice = f"; 'auto' takes {fitting}" if fitting and fitting != rates else ""
    used = f" ({rates})" if rates else ""
    return (
        f"the training loss does not fall: {first:.4g} in round 1, {last:.4g} in round {LOOKED_AT}; most "
        f"likely the learning rate is too {size}{used}{advice}"
    )
