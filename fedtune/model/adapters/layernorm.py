"""Normalisation layers, by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.errors import FedtuneError
from fedtune.model.adapters.base import Adapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class LayerNorm(Adapter):
    """kind = "layernorm": gains and offsets of every normalisation layer (Zhao et al. 2023,
    arXiv:2312.11420)."""

    kind: Literal["layernorm"] = "layernorm"
    beside: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def attach(self, base: Base) -> tuple[Any, Named]:
        import re

        import peft

        from fedtune.model.adapters.layers import in_head
        from fedtune.model.adapters.wrap import peft_arguments, with_peft

        norms = [
            name
            for name, module in base.net.named_modules()
            if re.search(r"(Layer|RMS)Norm$", type(module).__name__) and not in_head(base, name)
        ]
        if not norms:
            raise FedtuneError(
                "M306",
                f"no normalisation layer in {base.name}",
                "a model with LayerNorm or RMSNorm",
                "choose another method.adapter.kind",
            )
        return with_peft(base, peft.LNTuningConfig(target_modules=norms, **peft_arguments(base)))
