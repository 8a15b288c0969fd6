"""Which modules of a transformer stand before its blocks and which behind: seen by running the model's own
forward on the meta device.

Blocks are passed over while looking, so the look costs no memory and no arithmetic, whatever the model's
size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.errors import FedtuneError

# Blocks of these want more than hidden states, mask and positions: relative position tables made beside the
# embeddings, which a body does not hold.
ENTANGLED = ("deberta", "deberta-v2", "swin", "swinv2", "t5", "mt5", "umt5")
CAPACITY = ("expert_capacity", "capacity_factor", "moe_capacity_factor", "moe_eval_capacity_token_fraction")
COPIED = (
    "attention_type",
    "layer_type",
    "is_sliding",
    "layer_idx",
)  # what a model's forward reads off a block that it is about to call


@dataclass(frozen=True)
class Anatomy:
    """Paths are those of `named_modules` of the network with its task head.

    front     modules with parameters that run before the first block, in order; the first makes the
              embeddings
    rear      modules with parameters that run behind the last block, or never
    pairs     whether blocks answer with a tuple whose first is the hidden state (bloom, falcon)
    extras    what the embeddings answer with beside the hidden state (BEiT: the number of patches), None for
              most
    place     where prompts go: 1 behind the class token of an encoder, 0 before the text of a decoder
    """

    base: str
    layers: str
    blocks: int
    width: int
    front: tuple[str, ...]
    rear: tuple[str, ...]
    pairs: bool
    extras: tuple[Any, ...] | None
    place: int
    image: bool


class Skip(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Stands where a foreign block stood, at the same index, and owns nothing."""

    def __init__(self, like: nn.Module, pairs: bool) -> None:
        super().__init__()
        for name in COPIED:
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))
        self.pairs = pairs

    def forward(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return (hidden_states,) if self.pairs else hidden_states


class Pairs(Exception):
    """Blocks answer with a tuple."""


def look(net_class: type, config: Any) -> Anatomy:
    """The anatomy of a class of networks with this configuration. Raises S701 (no such cut) and S704 (rows of
    a batch would mix)."""
    refuse(config)
    try:
        return followed(net_class, config)
    except FedtuneError:
        raise
    # a forward that wants values, or more of its blocks than that they can be called, raises what it likes
    except Exception as error:
        why = next(iter(str(error).splitlines()), "")[:160]
        found = (
            f"a {net_class.__name__}, whose forward cannot be followed to its blocks "
            f"({type(error).__name__}: {why})"
        )
        expected, do = (
            "a transformer that calls its blocks one after the other",
            "choose another model, or [method] type = 'fedpeft'",
        )
        raise FedtuneError("S701", found, expected, do) from error


def followed(net_class: type, config: Any) -> Anatomy:
    """The same, where the network is of the kind that this can read; else it raises S701 or whatever stopped
    it."""
    with torch.device("meta"):
        net = net_class(copy.deepcopy(config)).eval()
    net.config.use_cache = True  # or masks are made of values, which nothing has here
    net.config.pad_token_id = None  # or GPT-2 looks for padding in ids that have no values
    base_path = net.base_model_prefix if hasattr(net, net.base_model_prefix) else ""
    base = net.get_submodule(base_path)
    layers_path = ".".join(part for part in (base_path, layer_list(base, config)) if part)
    beside = list(siblings(net, layers_path))
    image = net.main_input_name == "pixel_values"
    for pairs in (False, True):
        try:
            front, extras = trace(net, base, layers_path, beside, pairs, image)
            break
        except Pairs:
            continue
    text = config.get_text_config()
    return Anatomy(
        base=base_path,
        layers=layers_path,
        blocks=len(net.get_submodule(layers_path)),
        width=text.hidden_size,
        front=tuple(front),
        rear=tuple(path for path in beside if path not in front),
        pairs=pairs,
        extras=extras,
        place=1 if hasattr(base, "embeddings") else 0,
        image=image,
    )


def refuse(config: Any) -> None:
    text = config.get_text_config()
    for name in CAPACITY:
        if getattr(text, name, None) is not None:
            raise FedtuneError(
                "S704",
                f"a {text.model_type} whose experts drop tokens beyond a capacity ({name})",
                "a model in which no row of a batch can change another's",
                "choose a dense model or one with dropless experts",
            )
    if getattr(config, "is_encoder_decoder", False):
        found, expected = f"a {config.model_type}, which is an encoder and a decoder", "one stack of blocks"
        raise FedtuneError("S701", found, expected, "choose another model, or [method] type = 'fedpeft'")
    if (
        text.model_type in ENTANGLED
        or getattr(text, "use_shared_relative_position_bias", False)
        or getattr(text, "output_router_logits", False)
    ):
        raise entangled(text.model_type)


def entangled(kind: str) -> FedtuneError:
    found, expected = (
        f"a {kind}, whose blocks or loss need tensors that do not cross the cut",
        "a model whose blocks need only hidden states, a mask and positions",
    )
    return FedtuneError("S701", found, expected, "choose another model, or [method] type = 'fedpeft'")


def learned(value: Any) -> bool:
    """Whether anything in it is made of parameters (a table of relative positions, say), which the side
    behind the cut does not hold."""
    if isinstance(value, (tuple, list)):
        return any(map(learned, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def block_count(config: Any) -> int:
    """How many blocks a configuration says. Raises S701 for networks in stages (ResNet, Swin), whose blocks
    are not alike."""
    count: int = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not count:
        raise FedtuneError(
            "S701",
            f"a {config.model_type}, which is not a stack of identical blocks",
            "a transformer such as ViT, BERT or Llama",
            "choose another model",
        )
    return count


def layer_list(base: nn.Module, config: Any) -> str:
    """Path of the list of blocks below the backbone."""
    count = block_count(config)
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if count < 2 or not found or len({id(block) for block in base.get_submodule(found[0])}) < count:
        raise FedtuneError(
            "S701",
            f"a {type(base).__name__} with {count} blocks in {len(found)} lists",
            "one list of two or more different blocks",
            "choose another model",
        )
    return str(min(found, key=lambda name: name.count(".")))


def siblings(net: nn.Module, path: str) -> Iterator[str]:
    """Modules with parameters beside the path from the network to its blocks, the uppermost of each
    branch."""
    here, module = "", net
    for step in path.split("."):
        if any(True for _ in module.parameters(recurse=False)):
            raise FedtuneError(
                "S701",
                f"parameters of {type(module).__name__} outside its modules",
                "parameters in modules that run",
                "choose another model",
            )
        for name, child in module.named_children():
            if name != step and any(True for _ in child.parameters()):
                yield here + name
        here, module = f"{here}{step}.", getattr(module, step)


def trace(
    net: nn.Module, base: nn.Module, layers_path: str, beside: list[str], pairs: bool, image: bool
) -> tuple[list[str], tuple[Any, ...] | None]:
    """Which of `beside` run before the first block, and what the first of them answers with beside its
    tensor."""
    blocks = net.get_submodule(layers_path)
    for number, block in enumerate(blocks):
        blocks[number] = Skip(block, pairs)
    front: list[str] = []
    extras: list[tuple[Any, ...]] = []
    started: list[bool] = []

    def begun(module: Any, args: Any, named: dict[str, Any]) -> None:
        started.append(True)
        others = [*args[1:], *(value for name, value in named.items() if name != "hidden_states")]
        if any(map(learned, others)):
            raise entangled(net.config.get_text_config().model_type)

    def second(module: Any, args: Any, named: dict[str, Any]) -> None:
        if (
            args[0] if args else named["hidden_states"]
        ).ndim != 3:  # the model took [0] of a tensor: it expects a tuple
            raise Pairs

    def ran(path: str) -> Any:
        def after(module: Any, args: Any, output: Any) -> None:
            if not started and path not in front:
                if not front and isinstance(output, tuple):
                    extras.append(output[1:])
                front.append(path)

        return after

    handles = [
        blocks[0].register_forward_pre_hook(begun, with_kwargs=True),
        blocks[1].register_forward_pre_hook(second, with_kwargs=True),
    ]
    handles += [net.get_submodule(path).register_forward_hook(ran(path)) for path in beside]
    try:
        with torch.enable_grad():  # shows what is made of parameters
            base(**blank(net.config, image, 1, 3, torch.device("meta")))
    finally:
        for handle in handles:
            handle.remove()
    return front, extras[0] if extras else None


def blank(config: Any, image: bool, rows: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of the right shape and no content, for a forward whose hidden state comes from elsewhere."""
    if not image:
        return {"input_ids": torch.zeros(rows, tokens, dtype=torch.long, device=device)}
    size = (
        config.image_size
        if isinstance(config.image_size, (list, tuple))
        else (config.image_size, config.image_size)
    )
    return {"pixel_values": torch.zeros(1, device=device).expand(rows, config.num_channels, *size)}
