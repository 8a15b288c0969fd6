"""A model with fewer blocks, made of another's tensors: what the owner of a model gives away in its place.

Xiao, Lin and Han 2023, "Offsite-Tuning: Transfer Learning without Full Model" (arXiv:2302.04870). The network
is one of the same class whose configuration says fewer blocks, so stock transformers loads what `save` puts
down. It borrows the model's own parameters and costs no memory, but for blocks whose numbers are rounded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.errors import FedtuneError
from fedtune.hf.pooling import set_pooling, stated
from fedtune.hf.probe import try_once
from fedtune.model.adapters import Adapter, Full, LayerAdapter
from fedtune.model.adapters.layers import in_head, target_layers
from fedtune.model.base import Base, load
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import without
from fedtune.types import LM_TASKS

MARK = "fedtune_emulator"  # where a configuration says that its model is an emulator, and of what


@dataclass(frozen=True)
class Emulation:
    """What an emulator is of its model.

    layers  path of the list of blocks
    blocks  of the model
    kept    which of them the emulator has, in order
    bits    of a number in the matrices of the frozen ones; 0: as they were
    of      fingerprint of the model, in a folder that is given away; "" in memory
    distilled  whether the frozen blocks have learned to stand for those that were left out
    """

    layers: str
    blocks: int
    kept: tuple[int, ...]
    bits: int = 0
    of: str = ""
    distilled: bool = False

    @classmethod
    def read(cls, config: Any) -> Emulation | None:
        """From a configuration; None where it is no emulator's. Raises S721 for what nobody wrote."""
        told = getattr(config, MARK, None)
        if told is None:
            return None
        try:
            about = cls(**{**told, "kept": tuple(told["kept"])})
            order = sorted({number for number in about.kept if 0 <= number < about.blocks})
            sound = bool(order) and list(about.kept) == order
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            found = f"config.json of a model whose '{MARK}' is {str(told)[:80]}"
            raise FedtuneError("S721", found, "what fedtune offsite writes", "get the emulator again")
        return about

    def told(self) -> dict[str, Any]:
        known = {**vars(self), "kept": list(self.kept)}
        return known if self.distilled else {key: one for key, one in known.items() if key != "distilled"}

    @property
    def in_words(self) -> str:
        return f"blocks {self.kept} with bits = {self.bits}" + ", distilled" * self.distilled

    def in_model(self, name: str) -> str:
        """A tensor's name in the emulator (with peft's or anybody's prefix) -> its name in the model."""
        return renumbered(name, self.layers, self.kept)

    def plugged(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors that were trained in the emulator, by their names in the model."""
        return {self.in_model(name): value for name, value in tensors.items()}


def renumbered(name: str, layers: str, numbers: Sequence[int]) -> str:
    """
    >>> renumbered("base_model.model.h.2.attn.lora_A.weight", "model.h", (0, 1, 9))
    'base_model.model.h.9.attn.lora_A.weight'
    """
    found = re.search(rf"(?<!\w){re.escape(layers)}\.(\d+)(?=\.)", name)
    return name if not found else f"{name[: found.start(1)]}{numbers[int(found[1])]}{name[found.end(1) :]}"


def block_of(name: str, layers: str) -> int | None:
    """The number of the block that a module or tensor belongs to."""
    found = re.match(rf"{re.escape(layers)}\.(\d+)(\.|$)", name)
    return int(found[1]) if found else None


def emulate(
    base: Base, about: Emulation, ends: Collection[int], middle: Mapping[str, np.ndarray] | None = None
) -> Base:
    """The emulator of a base. Its blocks `ends` (by its own numbers) keep their values whatever `bits` is.

    middle  values of the others, by their names in it, that take the place of the base's before rounding

    Raises S721 where the model's configuration cannot say which blocks are left.
    """
    with without(base.attached) if base.attached else nullcontext():
        return emulated(base, about, ends, middle or {})


def emulated(base: Base, about: Emulation, ends: Collection[int], middle: Mapping[str, np.ndarray]) -> Base:
    """The same, of a base with no adapter on it."""
    config = shallower(base.net.config, about)
    try:
        with torch.device("meta"):
            net = type(base.net)(config)
        borrow(net, base.net, about)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise unlike(base, next(iter(str(error).splitlines()), "")[:120]) from error
    net.requires_grad_(False).eval()
    fresh = frozenset(base.fresh & dict(net.named_parameters()).keys())
    made = replace(base, net=net, fresh=fresh, notes=(), logits_apart=None, fits={}, attached=None)
    compare(made, base, about)
    replace_values(net, middle)
    if about.bits:
        for number, block in enumerate(net.get_submodule(about.layers)):
            if number not in ends:
                round_matrices(block, about.bits)
    made.__post_init__()
    set_pooling(net, base.pooling)
    return made


def shallower(config: Any, about: Emulation) -> Any:
    """The configuration of the same model with only these blocks; a list with an entry for each block is cut
    as they are."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for key, value in list(vars(text).items()):
        each = isinstance(value, (list, tuple)) and len(value) == about.blocks
        if each and not key.endswith(("token_id", "architectures")):
            setattr(text, key, type(value)(value[number] for number in about.kept))
    text.num_hidden_layers = len(about.kept)
    setattr(made, MARK, about.told())
    return made


def borrow(net: Any, source: Any, about: Emulation) -> None:
    """Put the source's parameters and buffers into a network without any. Raises KeyError, ValueError where
    there is none of that name, or of another shape."""
    for own, others, store in (
        (net.named_parameters, source.named_parameters, "_parameters"),
        (net.named_buffers, source.named_buffers, "_buffers"),
    ):
        known = dict(others(remove_duplicate=False))
        for name, value in list(own(remove_duplicate=False)):
            found = known[about.in_model(name)]
            if found.shape != value.shape:
                raise ValueError(f"'{name}' of shape {tuple(value.shape)}, not {tuple(found.shape)}")
            path, _, key = name.rpartition(".")
            getattr(net.get_submodule(path), store)[key] = found
    for path, module in net.named_modules():  # tensors that are neither: tables of angles, in some classes
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, key, getattr(source.get_submodule(about.in_model(f"{path}.")[:-1]), key))


def compare(made: Base, base: Base, about: Emulation) -> None:
    """Whether each block of the emulator is the block of the model that it stands for: alike in its settings,
    and in what it answers to one input. Raises S721."""
    mine, all_blocks = (list(one.net.get_submodule(about.layers)) for one in (made, base))
    theirs = [all_blocks[place] for place in about.kept]
    for number, place in enumerate(about.kept):
        if different := odd_settings(mine[number], theirs[number], number, place):
            raise unlike(base, f"block {place} would differ in {different}")
    if base.device.type == "meta":
        return
    odd: list[int] = []

    def heard(place: int) -> Any:
        def after(module: Any, args: Any, named: Any, output: Any) -> None:
            again = theirs[about.kept.index(place)](*args, **named)
            if not torch.allclose(tensor_of(output), tensor_of(again), rtol=1e-3, atol=1e-5):
                odd.append(place)

        return after

    handles = [
        block.register_forward_hook(heard(place), with_kwargs=True)
        for block, place in zip(mine, about.kept, strict=True)
    ]
    text = made.net.config.get_text_config()
    caches, text.use_cache = getattr(text, "use_cache", None), False  # a second call would add to a cache
    try:
        try_once(made.net, made)
    finally:
        text.use_cache = caches
        for handle in handles:
            handle.remove()
    if odd:
        raise unlike(base, f"block {odd[0]} would answer otherwise")


def tensor_of(output: Any) -> torch.Tensor:
    """The hidden states that a block answers."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def odd_settings(mine: nn.Module, theirs: nn.Module, number: int, place: int) -> str:
    """The first plain attribute in which two blocks differ, but for their own numbers; "" where there is
    none."""
    for (name, one), (_, other) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        for key, value in vars(one).items():
            if isinstance(value, (bool, int, float, str)) or value is None:
                known = getattr(other, key, None)
                if value != known and (value, known) != (number, place):
                    return f"{name}.{key}".lstrip(".")
    return ""


def unlike(base: Base, why: str) -> FedtuneError:
    return FedtuneError(
        "S721",
        f"a {type(base.net).__name__}, whose configuration cannot say which blocks an emulator keeps ({why})",
        "a model whose blocks are alike, or listed one by one in config.json",
        "choose another method.keep, such as 1.0, or another model",
    )


def replace_values(net: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Parameters of their own with these values, in the place of those of the same names."""
    known = dict(net.named_parameters())
    made = {
        id(known[name]): nn.Parameter(
            torch.from_numpy(value).to(known[name].device, known[name].dtype), requires_grad=False
        )
        for name, value in values.items()
    }
    for module in net.modules():
        for key, held in module._parameters.items():
            module._parameters[key] = made.get(id(held), held)


def round_matrices(block: nn.Module, bits: int) -> None:
    """Numbers of the block's matrices, rounded to 2^bits - 1 levels around zero, a scale for each output."""
    levels = 2 ** (bits - 1) - 1
    for module in block.modules():
        for key, value in module._parameters.items():
            if value is not None and value.ndim > 1:
                numbers = value.detach().float()
                scale = numbers.abs().amax(dim=tuple(range(1, numbers.ndim)), keepdim=True) / levels
                rounded = torch.round(numbers / scale.clamp(min=1e-12)) * scale
                module._parameters[key] = nn.Parameter(rounded.to(value.dtype), requires_grad=False)


def at_blocks(base: Base, adapter: Adapter, layers: str, numbers: Collection[int]) -> Adapter:
    """The adapter, on these blocks and the task head alone. Raises S721 where it would train nothing."""
    if isinstance(adapter, LayerAdapter):
        names = target_layers(base, adapter)
        key = "targets"
    else:
        assert isinstance(adapter, Full)  # the recipe's rules have refused other kinds
        names = [
            name
            for name in base.weights
            if not adapter.only or any(fnmatchcase(name, pattern) for pattern in adapter.only)
        ]
        key = "only"
    chosen = tuple(name for name in names if block_of(name, layers) in numbers and not in_head(base, name))
    if not chosen:
        raise FedtuneError(
            "S721",
            f"an adapter of kind '{adapter.kind}' that trains nothing in blocks {sorted(numbers)}",
            "something to train in the blocks at the ends",
            f"change method.adapter.{key}, or method.first and method.last",
        )
    return adapter.model_copy(update={key: chosen})


def save(emulator: Base, folder: Path, of: str) -> None:
    """Write an emulator for its users to load like any model, without a task head that nobody has trained.
    Raises S721 where what a site would load is not it.

    of  fingerprint of the model that it was made from
    """
    whole = emulator.task in LM_TASKS or emulator.kept_head
    net = emulator.net if whole else emulator.net.base_model
    prefix = "" if whole else f"{emulator.net.base_model_prefix}."
    about = Emulation.read(emulator.net.config)
    assert about is not None
    config = net.config
    setattr(config, MARK, replace(about, of=of).told())
    try:
        tensors = {
            name: value for name, value in net.state_dict().items() if prefix + name not in emulator.fresh
        }
        net.save_pretrained(folder, state_dict=tensors)
        emulator.tokenizer.save_pretrained(folder)
    finally:
        setattr(config, MARK, about.told())
    dtype = str(next(iter(emulator.weights.values())).dtype).removeprefix("torch.")
    model = {"name": str(folder), "dtype": dtype, "pooling": stated(emulator.pooling), "device": "cpu"}
    again = load(ModelSettings.model_validate(model), emulator.task, emulator.labels, 0)
    if again.fingerprint != emulator.fingerprint:
        raise FedtuneError(
            "S721",
            f"an emulator that is another model once it is written and read ({again.fingerprint[:12]} for "
            f"{emulator.fingerprint[:12]})",
            "a model whose files hold all of it",
            "choose another model",
        )


def shares(model: Base, emulator: Base) -> Iterator[tuple[str, int]]:
    """Values of the model that an emulator holds: as they are, and rounded or distilled."""
    exact = {id(value) for value in model.weights.values()}
    about = Emulation.read(emulator.net.config)
    other = "distilled" if about and about.distilled else "rounded"
    yield "as they are", sum(v.numel() for v in emulator.weights.values() if id(v) in exact)
    yield other, sum(v.numel() for v in emulator.weights.values() if id(v) not in exact)
