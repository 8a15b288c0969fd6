"""Trained tensors of several clients as one: in a batch of all their rows, each row meets its own client's.

The frozen base sees one large batch, and only the few operations that a trained tensor takes part in are done
client by client, as batched products. So k adapters are trained in one pass over one base: what Punica and
S-LoRA do for inference (Chen et al. 2023, arXiv:2310.18547), with gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedtune.errors import FedtuneError

Place = tuple[nn.Module, str]  # a module, and the name of its parameter


class Stacked:
    """One trained tensor of k clients, (k, *shape), where a module expects a parameter of that shape.

    A batch's rows are in k blocks of equal size, in the clients' order. Works in linear layers, layer norms,
    sums and products with activations; anything else is M306.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @property
    def shape(self) -> torch.Size:
        """One client's."""
        return self.values.shape[1:]

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "is_meta", "is_cuda", "requires_grad"):
            return getattr(self.values, name)
        raise AttributeError(name)

    def dim(self) -> int:
        return len(self.shape)

    def to(self, *args: Any, **kwargs: Any) -> Stacked:
        return Stacked(self.values.to(*args, **kwargs))

    def __add__(self, other: torch.Tensor) -> torch.Tensor:
        return by_client(operator.add, other, self)

    def __mul__(self, other: Any) -> Any:
        return by_client(operator.mul, other, self) if isinstance(other, torch.Tensor) else self.scaled(other)

    __radd__, __rmul__ = __add__, __mul__

    def scaled(self, factor: float) -> Stacked:
        return Stacked(self.values * factor)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        ours = OPERATIONS.get(func)
        if ours is None:
            raise FedtuneError(
                "M306",
                f"an adapter that takes part in {getattr(func, '__name__', func)}",
                "one in linear layers, layer norms, sums or products: lora, head, bias, layernorm",
                "set method.train.together = 1, or choose another kind",
            )
        return ours(*args, **(kwargs or {}))


def by_client(what: Callable[[Any, Any], Any], rows: torch.Tensor, own: Stacked) -> torch.Tensor:
    """A sum or product of activations (rows, ..., *shape) with each row's own tensor."""
    parts = blocks(rows, own)
    values = own.values.reshape(len(own.values), *[1] * (parts.dim() - own.values.dim()), *own.shape)
    result: torch.Tensor = what(parts, values)
    return result.reshape(rows.shape)


def blocks(rows: torch.Tensor, own: Stacked) -> torch.Tensor:
    """(rows, ...) -> (k, rows of a client, ...)."""
    clients = len(own.values)
    if rows.shape[0] % clients:
        raise FedtuneError(
            "M306",
            f"{rows.shape[0]} rows of activations for {clients} clients",
            "as many rows for each, in the order of the batch",
            "set method.train.together = 1 for this model",
        )
    return rows.reshape(clients, rows.shape[0] // clients, *rows.shape[1:])


def linear(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    if not isinstance(weight, Stacked):
        return functional.linear(x, weight) + bias
    parts = blocks(x, weight)
    flat = parts.reshape(len(parts), -1, parts.shape[-1])
    out = torch.bmm(flat, weight.values.transpose(1, 2)).reshape(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    plain = functional.layer_norm(x, shape, None, None, eps)
    result: torch.Tensor = plain if weight is None else plain * weight
    return result if bias is None else result + bias


def either(what: Callable[[Any, Any], Any]) -> Callable[..., torch.Tensor]:
    """A sum or product whichever way round it is written."""
    return lambda a, b: by_client(what, a, b) if isinstance(b, Stacked) else by_client(what, b, a)


OPERATIONS: dict[Any, Callable[..., Any]] = {
    functional.linear: linear,
    functional.layer_norm: layer_norm,
    **dict.fromkeys((torch.add, torch.Tensor.add, torch.Tensor.__radd__), either(operator.add)),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.Tensor.__rmul__), either(operator.mul)),
}


def places_of(net: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, list[Place]]:
    """Name of a trained tensor -> where the network has it."""
    names = {id(value): name for name, value in named.items()}
    found: dict[str, list[Place]] = {name: [] for name in named}
    for module in net.modules():
        for key, value in module._parameters.items():
            if value is not None and id(value) in names:
                found[names[id(value)]].append((module, key))
    return found


@contextmanager
def put(
    places: Mapping[str, Sequence[Place]], tensors: Mapping[str, Sequence[torch.Tensor]]
) -> Iterator[None]:
    """The network with several clients' tensors in place of its own, for a while."""
    before = [(module, key, module._parameters[key]) for spots in places.values() for module, key in spots]
    try:
        for name, spots in places.items():
            own = Stacked(torch.stack(list(tensors[name])))
            for module, key in spots:
                module._parameters[key] = own
        yield
    finally:
        for module, key, value in before:
            module._parameters[key] = value
