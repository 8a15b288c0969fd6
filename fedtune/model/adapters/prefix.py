"""Prefix tuning, by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.model.adapters.base import PromptAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Prefix(PromptAdapter):
    """kind = "prefix": keys and values before every block's own (Li and Liang 2021, arXiv:2101.00190)."""

    kind: Literal["prefix"] = "prefix"
    caches: ClassVar[bool] = True

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Needs a model that takes a cache. Raises M306."""
        import peft

        from fedtune.model.adapters.layers import unfit
        from fedtune.model.adapters.wrap import peft_arguments, with_peft
        from fedtune.model.blocks import is_encoder

        if base.task == "image-classify" or is_encoder(base):
            raise unfit(
                base,
                self.kind,
                "a decoder, which takes a cache of keys and values",
                'choose kind = "prompt" with deep = true',
            )
        return with_peft(
            base, peft.PrefixTuningConfig(num_virtual_tokens=self.tokens, **peft_arguments(base))
        )
