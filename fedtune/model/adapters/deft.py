"""A branch beside a layer and one behind it, by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fedtune.model.adapters.base import LayerAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Deft(LayerAdapter):
    """kind = "deft": W becomes W + P R - P relu(P)^T W. P R is a branch beside a linear layer, as LoRA's;
    P relu(P)^T W one behind it, of what the layer says, as in Hydra (Kim et al. 2023, arXiv:2309.06922),
    whose two branches share nothing. peft's DEFT, decompositional efficient fine-tuning."""

    kind: Literal["deft"] = "deft"
    merges: ClassVar[bool] = True
    switches_off: ClassVar[bool] = True
    rank: int = Field(8, ge=1)
    """Rank of P and R."""

    def attach(self, base: Base) -> tuple[Any, Named]:
        """P is drawn from the seed and R is what makes both branches cancel: the first state is the base, but
        for rounding."""
        import peft
        from torch import nn

        from fedtune.model.adapters.layers import target_layers, unfit
        from fedtune.model.adapters.wrap import peft_arguments, with_peft

        targets = target_layers(base, self)
        if not all(isinstance(base.net.get_submodule(name), nn.Linear) for name in targets):
            raise unfit(base, self.kind, "layers of torch's Linear", "choose another method.adapter.kind")
        config = peft.DeftConfig(
            r=self.rank, target_modules=targets, **peft_arguments(base, self.modules_to_save)
        )
        return with_peft(base, config)
