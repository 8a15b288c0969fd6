"""A sparse support of principal weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedtune.model.adapters.base import SparseAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Lift(SparseAdapter):
    """kind = "lift": the weights that are greatest in the base's low-rank approximation are trained, and stay
    the chosen ones for the whole run (Liu et al. 2025, arXiv:2506.00772; theirs are chosen again as they
    train)."""

    kind: Literal["lift"] = "lift"
    filter_rank: int = Field(32, ge=1)
    """Rank of the approximation; theirs are 32 to 128. At a layer's own rank: the greatest weights."""

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Values start at zero: the first state is the base itself."""
        import numpy as np

        from fedtune.model.sparse_support import greatest, low_rank, with_support

        def choose(name: str, weight: np.ndarray, count: int) -> np.ndarray:
            return greatest(np.abs(low_rank(weight, self.filter_rank)), count)

        return with_support(base, self, choose)
