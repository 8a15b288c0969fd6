"""Biases alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.model.adapters.base import Adapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Bias(Adapter):
    """kind = "bias": every parameter named bias, and the task head (BitFit, Ben Zaken et al. 2021,
    arXiv:2106.10199)."""

    kind: Literal["bias"] = "bias"
    merges: ClassVar[bool] = True

    def attach(self, base: Base) -> tuple[Any, Named]:
        from torch import nn

        from fedtune.model.adapters.layers import head_parameters, in_head, open_for_training, unfit

        own = {name for name in base.weights if name.rpartition(".")[2] == "bias" and not in_head(base, name)}
        if not own:
            raise unfit(
                base, self.kind, "a model whose layers have biases", "choose another method.adapter.kind"
            )
        named = open_for_training(base, own) | head_parameters(base)
        for module in (
            base.net.modules()
        ):  # a norm wants gain and offset in one type; a linear's are brought together by autocast
            gain = module._parameters.get("weight")
            if gain is not None and gain.ndim == 1 and module._parameters.get("bias") is not None:
                module._parameters["weight"] = nn.Parameter(gain.detach().float(), requires_grad=False)
        return base.net, named
