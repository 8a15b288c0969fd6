"""Which rows of a batch train, by `method.train.uds`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fedtune.model.encode import Encoded
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.tunable import TunableModel
from fedtune.model.uds import Uds
from fedtune.rng import stream

TOKENS, WORDS = 8, 128  # what a row's logits are projected to, before two rows are compared


@dataclass
class BatchChoice:
    """Of one client's round; what it has seen ends with it.

    seen  projections of the rows that have trained, (TOKENS * WORDS,) each
    """

    settings: Uds
    tunable: TunableModel
    encoded: Encoded
    seed: int
    seen: deque[Any] = field(init=False)
    _sides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen = deque(maxlen=self.settings.buffer)

    def kept(self, micro: Sequence[Sequence[int]]) -> list[list[int]]:
        """The examples of each micro-batch that train, in their order; of equal scores the first."""
        if self.settings.idle:
            return [list(indices) for indices in micro]
        return [self.best(list(indices)) for indices in micro]

    def best(self, indices: list[int]) -> list[int]:
        count = max(1, round(self.settings.keep * len(indices)))
        found = [self.looked_at(self.logits(index)) for index in indices]
        scores = [norm + self.settings.alpha * self.distance(at) for norm, at in found]
        order = sorted(range(len(indices)), key=lambda place: (-scores[place], place))[:count]
        self.seen.extend(found[place][1] for place in sorted(order))
        return [indices[place] for place in sorted(order)]

    def logits(self, index: int) -> torch.Tensor:
        """(tokens, vocabulary) of one example alone, so that there is no padding."""
        batch = self.encoded.collate([index])
        inputs, _ = inputs_of(self.tunable, batch)
        with evaluating(self.tunable), torch.no_grad(), autocast(self.tunable, "off"):
            said: torch.Tensor = self.tunable.net(**inputs).logits[0]
        return said[-batch["input_ids"].shape[1] :].float()  # without virtual tokens

    def looked_at(self, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Nuclear norm, and where the row lies: signs on both sides of the logits, scaled so that lengths
        stay on average (Johnson and Lindenstrauss)."""
        left, right = self.side("tokens", logits.shape[0], TOKENS), self.side("words", logits.shape[1], WORDS)
        place = left.to(logits).T @ logits @ right.to(logits)
        return nuclear_norm(logits), place.reshape(-1)

    def side(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns) of signs over the root of columns, drawn once for the longest row yet."""
        known = self._sides.get(name)
        if known is None or len(known) < rows:
            draw = stream(f"uds {name}", self.seed)
            signs = draw.integers(0, 2, (rows, columns), dtype="int8").astype("float32") * 2 - 1
            known = self._sides[name] = torch.from_numpy(signs / columns**0.5)
        return known[:rows]

    def distance(self, place: torch.Tensor) -> float:
        return float((torch.stack(list(self.seen)) - place).norm(dim=1).mean()) if self.seen else 0.0


def nuclear_norm(logits: torch.Tensor) -> float:
    """Sum of the singular values of (L, V), from the eigenvalues of the Gram matrix (L, L) in float64."""
    wide = logits.double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    return float(torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().sum())


@contextmanager
def evaluating(tunable: TunableModel) -> Iterator[None]:
    """Eval mode for a while: no dropout, and no draw of it. Every module comes back as it was."""
    modes = [(module, module.training) for module in tunable.net.modules()]
    tunable.net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
