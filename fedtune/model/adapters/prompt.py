"""Soft prompts, by peft or by hooks of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fedtune.model.adapters.base import PromptAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Prompt(PromptAdapter):
    """kind = "prompt": learned tokens before the text (Lester et al. 2021, arXiv:2104.08691), or before every
    block (VPT-deep, P-tuning v2)."""

    kind: Literal["prompt"] = "prompt"
    deep: bool = False
    """Fresh prompts before every block (VPT-deep, P-tuning v2) instead of the first only."""

    def attach(self, base: Base) -> tuple[Any, Named]:
        """peft's, started from rows of the vocabulary; or our own prompts (deep, images, generative
        classifiers).

        A generative classifier reads the last token that is not padding, which peft's prompts hide from it
        (they replace ids by embeddings).
        """
        import peft

        from fedtune.model.adapters.layers import head_parameters
        from fedtune.model.adapters.wrap import peft_arguments, prompt_sizes, with_peft
        from fedtune.model.blocks import add_prompts, is_encoder

        if self.deep or base.task == "image-classify" or (base.task == "classify" and not is_encoder(base)):
            return base.net, add_prompts(base, self.tokens, self.deep) | head_parameters(base)
        sizes = prompt_sizes(base)
        return with_peft(
            base,
            peft.PromptTuningConfig(
                num_virtual_tokens=self.tokens,
                prompt_tuning_init="SAMPLE_VOCAB",
                **sizes,
                **peft_arguments(base),
            ),
        )
