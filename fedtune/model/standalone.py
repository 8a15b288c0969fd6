"""Loads the model or adapter that lies beside this file. Needs torch, transformers and safetensors; peft
where adapter_config.json lies beside it.

from load import load

model, tokenizer = load()  # or load(base="folder of the base model")
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
AUTO = {
    "classify": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "instruct": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "image-classify": "AutoModelForImageClassification",
}


def load(base: str = "", folder: str | Path = HERE) -> tuple[Any, Any]:
    """The model in eval mode, and its tokenizer or image processor. `base` is needed where the base model has
    moved."""
    about = json.loads((Path(folder) / "fedtune.json").read_text())
    names = dict(enumerate(about["labels"]))
    classes = (
        {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: n for n, name in names.items()},
            "ignore_mismatched_sizes": True,
        }
        if names
        else {}
    )
    whole = (Path(folder) / "config.json").exists()  # a merged model
    net = getattr(transformers, AUTO[about["task"]]).from_pretrained(
        folder if whole else base or located(about["base"]), **classes
    )
    set_pooling(net, about.get("pooling", "own"))
    auto = (
        transformers.AutoImageProcessor if about["task"] == "image-classify" else transformers.AutoTokenizer
    )
    if whole:
        return net.eval(), auto.from_pretrained(folder)
    if about.get("pad_token_id") is not None:
        net.config.pad_token_id = net.config.get_text_config().pad_token_id = about["pad_token_id"]
    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(net, str(folder)).eval(), auto.from_pretrained(folder)
    tensors = load_file(str(Path(folder) / "fedtune_adapter.safetensors"))
    if about["adapter"]["kind"] == "adapter":
        add_bottlenecks(net, tensors)
    if "prompts" in tensors:
        add_prompts(net, tensors["prompts"], int(about["behind_class_token"]))
    unknown = net.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"tensors of another model: {', '.join(unknown[:3])}")
    return net.eval(), auto.from_pretrained(folder)


def set_pooling(net: Any, mode: str) -> None:
    """The head reads one vector wherever it looks: the mean of all tokens, the first, or the last; "own"
    leaves it to the class."""
    if mode == "own":
        return

    def pool(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = output.last_hidden_state
        mask = kwargs.get("attention_mask")
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
        rows = torch.arange(len(hidden), device=hidden.device)
        if mode == "mean":
            weights = mask[:, :, None].float()
            vector = ((hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)).to(hidden.dtype)
        elif mode == "cls":
            vector = hidden[rows, mask.int().argmax(1)]
        else:
            vector = hidden[rows, (torch.arange(mask.shape[1], device=hidden.device) * (mask > 0)).argmax(1)]
        output.last_hidden_state = vector[:, None].expand_as(hidden)
        if output.get("pooler_output") is not None:
            output.pooler_output = vector
        return output

    net.base_model.register_forward_hook(pool, with_kwargs=True)


def located(name: str) -> str:
    """A hub name or folder; package:NAME/FOLDER is a folder of an installed package."""
    if not name.startswith("package:"):
        return name
    package, _, inner = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the base model comes with the package '{package}', which is not installed")
    return str(Path(next(iter(spec.submodule_search_locations))) / inner)


def blocks_of(net: Any) -> Any:
    """The list of the transformer's blocks."""
    count = net.config.get_text_config().num_hidden_layers
    return next(
        module
        for module in net.base_model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


class Bottleneck(torch.nn.Module):  # type: ignore[misc]
    """h + up(gelu(down(h)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(torch.nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype)))).to(
            hidden.dtype
        )


def add_bottlenecks(net: Any, tensors: dict[str, torch.Tensor]) -> None:
    """One behind every block: one each, or one for all."""
    shapes = [
        value.shape
        for name, value in sorted(tensors.items())
        if name.startswith("bottlenecks.") and name.endswith("down.weight")
    ]
    net.bottlenecks = torch.nn.ModuleList([Bottleneck(width, inner) for inner, width in shapes])
    for number, block in enumerate(blocks_of(net)):
        chosen = net.bottlenecks[number % len(shapes)]

        def after(module: Any, args: Any, output: Any, own: Any = chosen) -> Any:
            return (own(output[0]), *output[1:]) if isinstance(output, tuple) else own(output)

        block.register_forward_hook(after)


def add_prompts(net: Any, prompts: torch.Tensor, place: int) -> None:
    """Prompts (1 or blocks, tokens, width) behind the class token (place 1) or before the text (place 0), cut
    off again behind the backbone."""
    net.prompts = torch.nn.Parameter(prompts)
    backbone, count = net.base_model, prompts.shape[1]

    def own(number: int, hidden: torch.Tensor) -> torch.Tensor:
        return net.prompts[number].to(hidden.dtype).expand(len(hidden), -1, -1)

    def insert(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, :place], own(0, hidden), hidden[:, place:]], 1)

    def longer(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = kwargs | {
                "attention_mask": torch.cat(
                    [mask[:, :place], mask.new_ones(len(mask), count), mask[:, place:]], 1
                )
            }
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

    def cut(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = torch.cat(
            [output.last_hidden_state[:, :place], output.last_hidden_state[:, place + count :]], 1
        )
        if kwargs.get("attention_mask") is not None:
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = torch.cat([mask[:, :place], mask[:, place + count :]], 1)
        return output

    backbone.register_forward_pre_hook(longer, with_kwargs=True)
    if place:
        backbone.embeddings.register_forward_hook(insert)
    backbone.register_forward_hook(cut, with_kwargs=True, prepend=True)
    for number, block in enumerate(blocks_of(net)):
        if len(prompts) > 1 and number:

            def renew(module: Any, args: Any, number: int = number) -> Any:
                return (
                    torch.cat([args[0][:, :place], own(number, args[0]), args[0][:, place + count :]], 1),
                    *args[1:],
                )

            block.register_forward_pre_hook(renew)
