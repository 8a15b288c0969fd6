"""Bottlenecks between the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fedtune.model.adapters.base import Adapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Bottleneck(Adapter):
    """kind = "adapter": a bottleneck after every block, shared by all blocks or one each (Houlsby et al.
    2019, arXiv:1902.00751, as in FedPEFT's code)."""

    kind: Literal["adapter"] = "adapter"
    beside: ClassVar[bool] = True
    reduction: int = Field(8, ge=1)
    """Hidden size divided by this is the width of the bottleneck."""
    shared: bool = True
    """One bottleneck for all blocks (FedPEFT's code), or one for each."""

    def attach(self, base: Base) -> tuple[Any, Named]:
        from fedtune.model.adapters.layers import head_parameters
        from fedtune.model.blocks import add_bottleneck

        return base.net, add_bottleneck(base.net, self.reduction, self.shared, base.device) | head_parameters(
            base
        )
