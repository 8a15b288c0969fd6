"""What the server takes for an answer by default: no number of one client, however large, ends or steers
everybody's run. The client is left out, and named.

    values    finite, and no larger than any parameter or difference ever is
    norm      at most [limits] spread times the largest median norm of earlier rounds; in the first, of what
              was given
    figures   finite, and at most FIGURE times what the median client said before
    weight    at most what a client's declared rows can weigh

Nothing here changes an answer: it counts as it is, or not at all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.errors import Refused
from fedtune.types import Tensors, Update

LARGEST = (
    1e12  # of a value: trained weights stay below 1e5, and squares of this are far from what float32 can hold
)
FIGURE, LEAST = (
    1000.0,
    10.0,
)  # a figure beyond so many times the median of before, and beyond this at all, is no figure
Key = tuple[
    str, tuple[str, ...]
]  # a verb and the names that its answer has: clients of different ranks are different


def anything(client: int, verb: str) -> float:
    """Most that an answer may weigh, where nothing was declared."""
    return math.inf


@dataclass
class Bounds:
    """Of one run. `most` is asked for a client's largest weight; what earlier rounds were like is kept in
    memory, and learned anew by a resumed run."""

    most: Callable[[int, str], float] = anything
    _norms: dict[Key, float] = field(default_factory=dict)  # the largest median of a round
    _figures: dict[tuple[str, str], float] = field(default_factory=dict)
    _round: int = 0
    _now: dict[Key, list[float]] = field(default_factory=dict)
    _said: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def check(
        self,
        number: int,
        client: int,
        name: str,
        verb: str,
        update: Update,
        given: Tensors,
        spread: float,
        noise: float = 0.0,
    ) -> None:
        """Raises Refused W606, W607. An answer that passes is remembered for the rounds after. `noise`: the
        standard deviation of what its client laid on every number of the sum over its rows."""
        self._begin(number)
        if update.weight > (most := self.most(client, verb)):
            raise Refused(
                "W606",
                f"weight {update.weight:g} of '{name}'",
                f"at most {most:g}, by the rows and bytes that it declared",
                "ask the site's operator",
            )
        key = (verb, tuple(sorted(update.tensors)))
        norm = norm_of(update)
        drowned = noise * math.sqrt(sum(value.size for value in update.tensors.values())) / update.weight
        if spread and norm is not None and norm > (limit := spread * (self._before(key, given) + drowned)):
            raise Refused(
                "W606",
                f"an answer of norm {norm:.4g} from '{name}'",
                f"at most {limit:.4g}",
                "look at that site, or raise limits.spread",
            )
        figures = {figure: abs(value) / update.weight for figure, value in update.metrics.items()}
        for figure, value in figures.items():
            before = self._figures.get((verb, figure))
            if not value <= LARGEST or (before is not None and value > max(LEAST, FIGURE * before)):
                raise Refused(
                    "W607",
                    f"'{figure}' = {value:.4g} from '{name}'",
                    f"about {before or 1:.4g}, as from the others",
                    "look at that site",
                )
        if norm is not None:
            self._now.setdefault(key, []).append(norm)
        for figure, value in figures.items():
            self._said.setdefault((verb, figure), []).append(value)

    def _before(self, key: Key, given: Tensors) -> float:
        if key in self._norms:
            return self._norms[key]
        real = {name: value for name, value in given.items() if value.dtype.kind == "f"}
        return max(1.0, norm_of(Update(real)) or 0.0)

    def _begin(self, number: int) -> None:
        """What the round before was like counts from here on."""
        if number == self._round:
            return
        self._round = number
        for key, norms in self._now.items():
            self._norms[key] = max(self._norms.get(key, 0.0), statistics.median(norms))
        for about, values in self._said.items():
            self._figures[about] = max(self._figures.get(about, 0.0), statistics.median(values))
        self._now, self._said = {}, {}


def norm_of(update: Update) -> float | None:
    """L2 of an answer's mean; None where it holds whole numbers, whose bounds are in its schema."""
    parts = [np.asarray(value).reshape(-1) for value in update.tensors.values()]
    if not parts or any(part.dtype.kind != "f" for part in parts):
        return None
    return math.sqrt(sum(float(np.dot(part, part)) for part in parts)) / update.weight


def too_large(tensors: Tensors | Mapping[str, np.ndarray], weight: float) -> str:
    """The first tensor with a value that is not finite or beyond LARGEST, "" where there is none."""
    most = min(LARGEST * weight, 1e300)  # below Inf, whatever the weight
    for name, value in tensors.items():
        if value.dtype.kind == "f" and value.size and not within(value.reshape(-1), most):
            return name
    return ""


def within(flat: np.ndarray, most: float) -> bool:
    """Whether no number is NaN or beyond `most`. Where all of them together are not longer than that, as
    nearly always, one pass says so."""
    with np.errstate(over="ignore", invalid="ignore"):
        if float(np.dot(flat, flat)) <= min(most * most, 1e300):  # NaN is not
            return True
    return bool(flat.max() <= most and flat.min() >= -most)
