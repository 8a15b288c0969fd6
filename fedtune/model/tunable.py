"""The shared base with one adapter on it: the few tensors that are trained can be read and written, nothing
else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.hf.draws import own_draws
from fedtune.hf.probe import try_once
from fedtune.model.adapters import Adapter
from fedtune.model.adapters.layers import in_head
from fedtune.model.adapters.wrap import plain
from fedtune.model.base import Base
from fedtune.types import LM_TASKS

CONTAINERS = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(eq=False)
class TunableModel:
    """What a client trains on.

    net     called with the batch's tensors; the base's network, or peft's wrapper around it
    named   name -> parameter, sorted; peft's file names where peft has the kind, the network's own names
            otherwise
    before  what `detach` goes back to
    total   number of all values, base and adapter
    still   parameters of the adapter that stay as the seed made them
    """

    base: Base
    settings: Adapter | None
    net: Any
    named: dict[str, torch.nn.Parameter]
    before: list[tuple[Any, dict[str, Any]]] = field(repr=False)
    total: int = 0
    still: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    # what clients train in the place of this model, which only its owner has (fedtune.model.emulator)
    emulator: TunableModel | None = None
    distilled: Mapping[str, float] = field(default_factory=dict)  # the emulator's error, before and after
    # what trains in the place of fedtune.model.fit.fit, with its first four arguments: a site's own script
    trainer: Callable[..., Any] | None = None
    # fedtune.model.initial_values.Origin, where a method rebuilds the trained tensors from their first values
    origin: Any = None
    # fedtune.experts.routers.Router over its layers, where a state with a gate is installed
    routed: Any = None

    @property
    def kind(self) -> str:
        return self.settings.kind if self.settings else "none"

    @property
    def at_clients(self) -> TunableModel:
        """What clients train: this model, or its emulator."""
        return self.emulator or self

    @property
    def in_cache(self) -> bool:
        """Whether the adapter lives in the model's cache of keys and values, which must then be kept."""
        return self.settings is not None and self.settings.caches

    @property
    def keeps_front(self) -> bool:
        """Whether training begins behind the frozen blocks (fedtune.model.kept_front)."""
        return self.settings is not None and self.settings.keeps_front

    @property
    def head(self) -> str:
        """Name of the task head's last matrix (classes, width) among the trained tensors; "" where no head of
        classes that started fresh is trained."""
        if self.base.task in LM_TASKS or self.base.kept_head:
            return ""
        names, classes = {id(value): name for name, value in self.named.items()}, len(self.base.labels)
        linear = (
            module
            for module in self.base.net.modules()
            if isinstance(module, torch.nn.Linear) and module.out_features == classes
        )
        return next(
            (names[id(module.weight)] for module in reversed(list(linear)) if id(module.weight) in names), ""
        )

    @property
    def of_head(self) -> frozenset[str]:
        """Names of the trained tensors that are the task head's."""
        return frozenset(name for name in self.named if in_head(self.base, plain(name)))

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        return sum(value.numel() for value in self.named.values())

    def check_live(self) -> None:
        """A tunable model whose adapter was taken off shares its network with whatever came after it: using
        it is a programmer's mistake."""
        if self.base.attached is not (self if self.settings else None):
            raise RuntimeError("this tunable model was taken off its base; attach it again")

    def parameters(self) -> list[torch.nn.Parameter]:
        """Trained parameters in name order."""
        return list(self.named.values())

    def read(self) -> dict[str, np.ndarray]:
        """Float32 copies of the trained tensors."""
        return read(self.named)

    def read_one(self, name: str) -> np.ndarray:
        """A float32 copy of one of them."""
        value: np.ndarray = self.named[name].detach().to("cpu", torch.float32, copy=True).numpy()
        return value

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Copy values into the trained tensors, in place. Raises M305 and changes nothing if names, shapes or
        types differ."""
        odd = sorted(self.named.keys() ^ tensors.keys())
        if odd:
            side = "a missing" if odd[0] in self.named else "an unknown"
            raise FedtuneError(
                "M305",
                f"{side} tensor '{odd[0]}' ({len(odd)} names differ)",
                f"the {len(self.named)} tensors of a '{self.kind}' adapter",
                "use tensors made with the same [model] and [method.adapter]",
            )
        for name, value in self.named.items():
            if tensors[name].dtype != np.float32:
                raise FedtuneError(
                    "M305",
                    f"'{name}' as {tensors[name].dtype}",
                    "float32",
                    "use tensors made with the same [model] and [method.adapter]",
                )
            if tuple(value.shape) != tuple(tensors[name].shape):
                raise FedtuneError(
                    "M305",
                    f"'{name}' of shape {tuple(tensors[name].shape)}",
                    f"{tuple(value.shape)}",
                    "use tensors made with the same [model] and [method.adapter]",
                )
        with torch.no_grad():
            for name, value in self.named.items():
                value.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))


def read(named: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Float32 copies."""
    return {name: value.detach().to("cpu", torch.float32, copy=True).numpy() for name, value in named.items()}


def attach(base: Base, settings: Adapter, seed: int) -> TunableModel:
    """Put an adapter on the base, initialised from `seed` alone; one that sits there already is taken off
    first.

    Trained tensors are float32, unless the adapter keeps the base's types. Raises M302 (unknown target) and
    M306 (kind unfit for the model).
    """
    if base.attached is not None:
        detach(base.attached)
    before = snapshot(base.net)
    try:
        with own_draws(seed):  # every kind draws on the CPU, so that the device does not matter
            net, named = settings.attach(base)
    except BaseException as error:
        restore(before)
        raise unfit(base, settings.kind, error) from error
    named = {name: named[name] for name in sorted(named)}
    trained = {id(value) for value in named.values()}
    for value in net.parameters():
        value.requires_grad_(id(value) in trained)
    for value in named.values() if not settings.keeps_types else ():
        value.data = value.data.float()
    tunable = TunableModel(
        base,
        settings,
        net.eval(),
        named,
        before,
        base.size + sum(v.numel() for n, v in named.items() if plain(n) not in base.weights),
    )
    try_bench(tunable)
    base.attached = tunable
    return tunable


def try_bench(tunable: TunableModel) -> None:
    """A kind that cannot stand on a model shows in its first forward pass: raise M306 now, with the base as
    it was, not in a client's first step.

    So does one that the model never looks at, such as a prefix in a cache that it does not read.
    """
    head = [value for name, value in tunable.named.items() if in_head(tunable.base, plain(name))]
    try:
        for value in head:  # which the answer depends on in any case
            value.requires_grad_(False)
        if not try_once(tunable.net, tunable.base) and len(head) < len(tunable.named):
            raise ValueError("nothing that it trains reaches what the model says")
    except BaseException as error:
        if tunable.base.device.type == "meta" and (
            isinstance(error, NotImplementedError) or "meta" in str(error)
        ):
            # the model looks at its numbers, which it does not have; it is tried again once there are weights
            return
        restore(tunable.before)
        raise unfit(tunable.base, tunable.kind, error) from error
    finally:
        for value in head:
            value.requires_grad_(True)


def unfit(base: Base, kind: str, error: BaseException) -> BaseException:
    """How peft and torch say that a model is not for a kind, as M306; everything else stays what it is."""
    if (
        isinstance(error, FedtuneError)
        or not isinstance(error, Exception)
        or isinstance(error, (MemoryError, torch.OutOfMemoryError))
    ):
        return error
    why = next(iter(str(error).splitlines()), "")[:160] or type(error).__name__
    return FedtuneError(
        "M306",
        f"kind '{kind}' with a {type(base.net).__name__} ({why})",
        "a model that it fits",
        "choose another method.adapter.kind",
    )


def detach(tunable: TunableModel) -> None:
    """Take the adapter off: the base's network is again what it was before `attach`, bit for bit. Nothing
    happens if it is off already."""
    if tunable.base.attached is tunable:
        restore(tunable.before)
        tunable.base.attached = None


@contextmanager
def without(tunable: TunableModel) -> Iterator[None]:
    """The base as it was before `attach`, for a while; the tunable model comes back as it was. Gradients are
    dropped."""
    now = snapshot(tunable.base.net)
    trained = [value for value in tunable.base.net.parameters() if value.requires_grad]
    restore(tunable.before)
    try:
        yield
    finally:
        restore(now)
        for value in trained:
            value.requires_grad_()


def snapshot(net: Any) -> list[tuple[Any, dict[str, Any]]]:
    """What every module holds (children, parameters, hooks, flags), by reference: no weights are copied.

    Adapters replace modules, parameters and hooks but never write into a pristine parameter, so this is all
    that it takes to go back.
    """
    return [
        (
            module,
            {name: value.copy() if name in CONTAINERS else value for name, value in vars(module).items()},
        )
        for module in net.modules()
    ]


def restore(before: list[tuple[Any, dict[str, Any]]]) -> None:
    """The inverse of `snapshot`."""
    for module, held in before:
        vars(module).clear()
        vars(module).update(
            {name: value.copy() if name in CONTAINERS else value for name, value in held.items()}
        )
        for value in held["_parameters"].values():
            if value is not None:
                value.requires_grad_(False)
                value.grad = None
