"""A sparse support of principal weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedtune.model.adapters.base import SparseAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Lift(SparseAdapter):
    """kind = "lift": the weights that are greatest in the low-rank approximation of the base are trained (Liu
    et al. 2025, arXiv:2506.00772). With `stages` they are chosen again as the weights change: a later stage's
    values are beside those of the stages before, which rest."""

    kind: Literal["lift"] = "lift"
    filter_rank: int = Field(32, ge=1)
    """Rank of the approximation; theirs are 32 to 128. At a layer's own rank: the greatest weights."""
    stages: int = Field(1, ge=1, le=64)
    """How often weights are chosen. Each stage has values of its own, all of which travel down; up travel
    those of the stage alone."""
    refresh: int = Field(10, ge=1)
    """stages above 1: rounds of a stage; the last one lasts until the end."""

    def stage(self, number: int) -> int:
        """Of a round."""
        return min((number - 1) // self.refresh, self.stages - 1)

    def turn(self, names: Iterable[str], number: int) -> frozenset[str]:
        if self.stages == 1:
            return frozenset(names)
        from fedtune.model.sparse_stages import in_turn

        return in_turn(names, self.stage(number))

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        if self.stages == 1:
            return
        here, one = f"method.adapter.stages = {self.stages}", "set stages = 1, or change the other"
        if not recipe.method.takes_turns:
            yield f"{here} with method.type = '{recipe.method.type}'", "method.type = 'fedpeft'", one
            return
        if recipe.aggregate.rule != "mean":
            yield f"{here} with aggregate.rule = '{recipe.aggregate.rule}'", "rule = 'mean'", one
        if recipe.method.server.optimizer != "none":
            yield f"{here} with method.server", "no moments, which belong to one stage's weights", one
        if recipe.downlink.lossy or recipe.downlink.remembers:
            yield f"{here} with [downlink]", "no [downlink]: what rests must arrive as it is", one
        if recipe.method.start_from:
            yield f"{here} with method.start_from", "stages that begin one after the other", one
        if (self.stages - 1) * self.refresh >= recipe.rounds:
            yield (
                f"{here} of {self.refresh} rounds each in a run of {recipe.rounds}",
                "a last stage that begins",
                "lower stages or refresh, or raise rounds",
            )

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Values start at zero: the first state is the base itself."""
        import numpy as np

        from fedtune.model.sparse_stages import with_stages
        from fedtune.model.sparse_support import greatest, low_rank, with_support

        def choose(name: str, weight: np.ndarray, count: int) -> np.ndarray:
            return greatest(np.abs(low_rank(weight, self.filter_rank)), count)

        net, named = with_support(base, self, choose, self.stages)
        return net, named | with_stages(net, self.stages, choose)
