"""P-tuning, by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.model.adapters.base import PromptAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class PTuning(PromptAdapter):
    """kind = "p-tuning": prompts from a small network (Liu et al. 2021, arXiv:2103.10385)."""

    has_encoder: ClassVar[bool] = True
    kind: Literal["p-tuning"] = "p-tuning"

    def attach(self, base: Base) -> tuple[Any, Named]:
        """The network travels while training, its output alone is exported."""
        import peft

        from fedtune.model.adapters.layers import unfit
        from fedtune.model.adapters.wrap import peft_arguments, prompt_sizes, with_peft
        from fedtune.model.blocks import is_encoder

        if base.task == "image-classify" or (base.task == "classify" and not is_encoder(base)):
            raise unfit(
                base, self.kind, "a text encoder or a causal language model", 'choose kind = "prompt"'
            )
        sizes = prompt_sizes(base)
        width = sizes["token_dim"]
        return with_peft(
            base,
            peft.PromptEncoderConfig(
                num_virtual_tokens=self.tokens, encoder_hidden_size=width, **sizes, **peft_arguments(base)
            ),
        )
