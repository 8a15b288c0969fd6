"""A sparse support with a low-rank update beside it, by peft's super-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fedtune.model.adapters.base import LayerAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Dsee(LayerAdapter):
    """kind = "dsee": the greatest weights of linear layers are trained, and a low-rank update of each layer
    with them (DSEE, Chen et al. 2021, arXiv:2111.00160, without its pruning; "Supra" of super-tuning,
    arXiv:2607.09287). Positions follow from the base, so that none travels."""

    kind: Literal["dsee"] = "dsee"
    merges: ClassVar[bool] = True
    switches_off: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    share: float = Field(0.005, gt=0, lt=1)
    """Of a layer's weights, those greatest in size are trained by themselves."""
    rank: int = Field(8, ge=1)
    """Rank of the update beside them."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha/rank."""

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Values and B are zero, A Kaiming-uniform from the seed: the first state is the base itself."""
        import peft
        from torch import nn

        from fedtune.model.adapters.layers import target_layers, unfit
        from fedtune.model.adapters.wrap import peft_arguments, with_peft
        from fedtune.model.sparse_support import choose_greatest

        targets = target_layers(base, self)
        layers = [base.net.get_submodule(name) for name in targets]
        if not all(isinstance(one, nn.Linear) and self.share * one.weight.numel() >= 1 for one in layers):
            raise unfit(
                base,
                self.kind,
                f"layers of torch's Linear, each of 1 / {self.share:g} weights or more",
                "raise method.adapter.share, or choose another method.adapter.kind or targets",
            )
        config = peft.SupertuningConfig(
            target_modules=targets,
            sparsity=1 - self.share,
            r=self.rank,
            lora_alpha=self.alpha,
            **peft_arguments(base, self.modules_to_save),
        )
        net, named = with_peft(base, config)
        choose_greatest(net)
        return net, named
