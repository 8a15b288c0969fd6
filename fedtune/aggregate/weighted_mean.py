"""The weighted mean of tensors, element by element: what linear rules are, and what every rule does with what
is not a pair."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedtune.aggregate.answer import misfit
from fedtune.errors import FedtuneError
from fedtune.types import Tensors

CHUNK = (
    1 << 16
)  # values; 512 KiB of float64 stay in the second cache, and numpy's calls cost little beside them


@dataclass
class WeightedMean:
    """Sums in float64, one client at a time: memory is that of one adapter, however many clients come.

    The mean of equal float32 values is that value to the bit, for up to 2**28 clients.
    """

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    weight: float = 0.0
    scratch: np.ndarray = field(default_factory=lambda: np.empty(CHUNK))

    def add(self, tensors: Tensors, weight: float) -> None:
        """Raises M305 where names or shapes differ from the first answer's: numpy would broadcast rank 1 over
        rank 8."""
        if not self.weight:
            self.sums = {name: np.zeros(np.shape(tensors[name])) for name in sorted(tensors)}
        if tensors.keys() != self.sums.keys():
            odd = sorted(tensors.keys() ^ self.sums.keys())[0]
            raise FedtuneError(
                "M305",
                f"'{odd}' in some answers only",
                "the same names from every client",
                "leave the odd client out",
            )
        for name, total in self.sums.items():
            value = np.asarray(tensors[name])
            if value.shape != total.shape:
                raise misfit(name, value.shape, total.shape)
            self._add(total.reshape(-1), value.reshape(-1), weight)
        self.weight += weight

    def _add(self, total: np.ndarray, value: np.ndarray, weight: float) -> None:
        for start in range(0, total.size, CHUNK):
            part = total[start : start + CHUNK]
            scratch = self.scratch[: part.size]
            scratch[:] = value[start : start + CHUNK]
            scratch *= weight
            part += scratch

    def mean(self) -> dict[str, np.ndarray]:
        """float32, in name order."""
        return {name: np.asarray(total / self.weight, dtype=np.float32) for name, total in self.sums.items()}
