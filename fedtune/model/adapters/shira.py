"""A sparse support that is drawn, or that has the greatest weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fedtune.model.adapters.base import SparseAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Shira(SparseAdapter):
    """kind = "shira": chosen weights of linear layers, and nothing else, are trained (Bhardwaj et al. 2024,
    arXiv:2406.13175); their positions follow from the recipe and the base, so that none travels."""

    kind: Literal["shira"] = "shira"
    support: Literal["random", "magnitude"] = "random"
    """Which weights: drawn from `seed`, or those greatest in size."""
    seed: int = 0
    """support = "random": another number, other weights; the run's own seed has no part in it."""

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Values start at zero: the first state is the base itself."""
        import numpy as np

        from fedtune.model.sparse_support import greatest, with_support
        from fedtune.rng import seed_of, stream

        def choose(name: str, weight: np.ndarray, count: int) -> np.ndarray:
            if self.support == "magnitude":
                return greatest(np.abs(weight), count)
            draw = stream(f"support of {name}", seed_of("support", self.seed))
            return np.sort(draw.choice(weight.size, count, replace=False))

        return with_support(base, self, choose)
