"""(IA)^3, by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.errors import FedtuneError
from fedtune.model.adapters.base import LayerAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base

KEYS_AND_VALUES = ("key", "k_proj", "value", "v_proj", "query_key_value", "c_attn", "qkv", "Wqkv")


class IA3(LayerAdapter):
    """kind = "ia3": scales on keys, values and the inner activation of the feed-forward part (Liu et al.
    2022, arXiv:2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    beside: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    switches_off: ClassVar[bool] = True

    def attach(self, base: Base) -> tuple[Any, Named]:
        """all-linear means just those; a linear that narrows outside the attention is taken for the second
        half of a feed-forward part."""
        import peft

        from fedtune.model.adapters.layers import narrows, target_layers
        from fedtune.model.adapters.wrap import peft_arguments, with_peft

        known = target_layers(base, self)
        wanted = [
            name
            for name in known
            if self.targets != ("all-linear",)
            or name.rpartition(".")[2] in KEYS_AND_VALUES
            or narrows(base, name)
        ]
        if not wanted:
            found = f"no key, value or feed-forward layer that 'ia3' knows in {base.name}"
            raise FedtuneError("M306", found, "names of layers to scale", "set method.adapter.targets")
        feed_forward = [name for name in wanted if narrows(base, name)]
        return with_peft(
            base,
            peft.IA3Config(
                target_modules=wanted,
                feedforward_modules=feed_forward,
                **peft_arguments(base, self.modules_to_save),
            ),
        )
