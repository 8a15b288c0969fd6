"""A curriculum: early steps draw from the first of a client's rows, in the order in which a selection put
them, and later ones from more and more of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedtune.rng import stream
from fedtune.settings import Settings

if TYPE_CHECKING:
    from fedtune.model.settings import TrainSettings


class Curriculum(Settings):
    """[method.train.curriculum]: a step at the share t of the run draws evenly from the first
    min(1, start + (1 - start) t / until) of the rows (competence-based curricula, Platanios et al. 2019,
    arXiv:1903.09848, with linear competence). The order is that of [[select]] by = "pvi" with
    order = true."""

    start: float = Field(1.0, gt=0, le=1)
    """Share of the rows at the run's beginning; 1 is all, and no curriculum."""
    until: float = Field(0.5, gt=0, le=1)
    """Share of the run after which all rows are drawn from."""

    @property
    def idle(self) -> bool:
        return self.start == 1

    def rows(self, done: float, count: int) -> int:
        """How many of `count` rows a step draws from, at a share of the run.

        >>> c = Curriculum(start=0.25, until=0.5)
        >>> [c.rows(done, 100) for done in (0.0, 0.25, 0.5, 1.0)]
        [25, 63, 100, 100]
        """
        return min(count, math.ceil(count * (self.start + (1 - self.start) * done / self.until)))

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        ordered = [f"[[select]] by = '{one.by}'" for one in recipe.select if one.orders]
        if ordered and self.idle:
            yield (
                f"{ordered[0]} that orders rows, without [method.train.curriculum]",
                "a curriculum, which alone looks at their order",
                "set method.train.curriculum.start, such as 0.2, or remove order",
            )
        if not ordered and not self.idle:
            yield (
                "[method.train.curriculum] with rows in no order",
                "[[select]] by = 'pvi' with order = true",
                "add it, or remove [method.train.curriculum]",
            )


def paced_batches(
    count: int, s: TrainSettings, seed: int, progress: tuple[int, int]
) -> Iterator[Sequence[Sequence[int]]]:
    """Per optimiser step, its micro-batches of example numbers, none twice in a micro-batch. As many steps as
    without a curriculum; `progress` = (rounds done, rounds)."""
    draw, (before, rounds) = stream("curriculum", seed), progress
    steps = s.steps or math.ceil(s.epochs * math.ceil(count / s.batch) / s.accumulate)
    for number in range(steps):
        most = s.curriculum.rows((before + number / steps) / rounds, count)
        size = min(s.batch, most)
        yield [draw.choice(most, size, replace=False).tolist() for _ in range(s.accumulate)]
