"""The two adapters that peft lacks, put between the blocks of any transformer by hooks: a bottleneck, and
prompts (deep or shallow)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from fedtune.errors import FedtuneError
from fedtune.model.base import Base

ENTANGLED = (
    "modernbert",
    "deberta",
    "deberta-v2",
    "swin",
    "swinv2",
)  # positions or masks are fixed before the embeddings are made


def is_encoder(base: Base) -> bool:
    """Whether the network attends in both directions and marks a class token first (BERT, ViT), so prompts go
    behind it.

    What was seen when the model was loaded decides; without weights, what the configuration says.
    """
    backbone, config = base.net.base_model, base.net.config.get_text_config()
    if base.causal is None and base.task != "image-classify":
        masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
        causal = getattr(config, "is_decoder", False) or (
            type(config) in transformers.AutoModelForCausalLM._model_mapping and not masked
        )
    else:
        causal = bool(base.causal)
    return hasattr(backbone, "embeddings") and not causal


def block_list(net: Any) -> nn.ModuleList:
    """The transformer's blocks: the list as long as the configuration says. Raises M306."""
    layers = net.config.get_text_config().num_hidden_layers
    for module in net.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise FedtuneError(
        "M306",
        f"no list of {layers} blocks in a {type(net).__name__}",
        "a transformer whose blocks are in one list",
        'choose kind = "lora" or "bias"',
    )


class Bottleneck(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """h + up(gelu(down(h))).

    FedPEFT's code starts both layers at zero. Then gelu(down h) = 0 and up^T g = 0, so neither matrix ever
    gets a gradient and
    only up's bias learns; here `up` alone is zero: the first state is still the base itself, and everything
    can learn.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # (examples, tokens, width) -> same
        inner = nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype)))
        return hidden + self.up(inner).to(hidden.dtype)


def add_bottleneck(net: Any, reduction: int, shared: bool, device: torch.device) -> dict[str, nn.Parameter]:
    """A bottleneck of width/reduction behind every block; the first in the list owns it where it is
    shared."""
    width = net.config.get_text_config().hidden_size
    inner = width // reduction
    if inner < 1:
        raise FedtuneError(
            "M306",
            f"method.adapter.reduction = {reduction} for a hidden size of {width}",
            f"at most {width}",
            "lower method.adapter.reduction",
        )
    blocks = block_list(net)
    made = [Bottleneck(width, inner).to(device) for _ in range(1 if shared else len(blocks))]
    for number, block in enumerate(blocks):
        bottleneck = made[0 if shared else number]

        def after(module: Any, args: Any, output: Any, bottleneck: Bottleneck = bottleneck) -> Any:
            return (bottleneck(output[0]), *output[1:]) if isinstance(output, tuple) else bottleneck(output)

        block.register_forward_hook(after)
    net.bottlenecks = nn.ModuleList(made)
    return {f"bottlenecks.{name}": value for name, value in net.bottlenecks.named_parameters()}


def add_prompts(base: Base, tokens: int, deep: bool) -> dict[str, nn.Parameter]:
    """Prompts (blocks or 1, tokens, width) that enter behind the class token (encoders) or before the text
    (decoders).

    Deep: before every block the prompts' places are filled anew, VPT-deep (Jia et al. 2022), P-tuning v2 in
    spirit. Drawn uniformly
    from +-sqrt(6 / (2 width)), which is VPT's range for ViT-B/16. The places are cut off behind the backbone,
    so heads see what they always saw.
    """
    net = base.net
    if net.config.model_type in ENTANGLED:
        raise FedtuneError(
            "M306",
            f"prompts between the blocks of a {type(net).__name__}",
            "a model whose blocks accept additional tokens",
            "choose another kind, or deep = false",
        )
    backbone, blocks = net.base_model, block_list(net)
    width, place = net.config.get_text_config().hidden_size, 1 if is_encoder(base) else 0
    reach = (3.0 / width) ** 0.5
    net.prompts = nn.Parameter(
        torch.empty(len(blocks) if deep else 1, tokens, width).uniform_(-reach, reach).to(base.device)
    )

    def longer(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = kwargs | {
                "attention_mask": torch.cat(
                    [mask[:, :place], mask.new_ones(len(mask), tokens), mask[:, place:]], 1
                )
            }
        # a decoder is given embeddings, so that it counts positions itself; heads outside the backbone still
        # see the ids
        if not place:
            ids = args[0] if args else kwargs["input_ids"]
            args, kwargs = (
                (),
                kwargs
                | {
                    "input_ids": None,
                    "inputs_embeds": insert(module, (), backbone.get_input_embeddings()(ids)),
                },
            )
        return args, kwargs

    def insert(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:  # (examples, tokens, width)
        return torch.cat(
            [
                hidden[:, :place],
                net.prompts[0].to(hidden.dtype).expand(len(hidden), -1, -1),
                hidden[:, place:],
            ],
            1,
        )

    def cut(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden, mask = output.last_hidden_state, kwargs.get("attention_mask")
        output.last_hidden_state = torch.cat([hidden[:, :place], hidden[:, place + tokens :]], 1)
        if mask is not None:  # so that whatever pools the states pools those of the text
            kwargs["attention_mask"] = torch.cat([mask[:, :place], mask[:, place + tokens :]], 1)
        return output

    backbone.register_forward_pre_hook(longer, with_kwargs=True)
    if place:
        backbone.embeddings.register_forward_hook(insert)
    backbone.register_forward_hook(cut, with_kwargs=True, prepend=True)
    for number, block in enumerate(blocks):
        if deep and number:

            def renew(module: Any, args: Any, number: int = number) -> Any:
                hidden = args[0]
                fresh = net.prompts[number].to(hidden.dtype).expand(len(hidden), -1, -1)
                return (torch.cat([hidden[:, :place], fresh, hidden[:, place + tokens :]], 1), *args[1:])

            block.register_forward_pre_hook(renew)
    return {"prompts": net.prompts}
