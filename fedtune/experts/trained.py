"""A gate that a run's clients train: its start, how it is trained on a network, and how it lies in a folder
with the experts that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from fedtune.aggregate import join, split
from fedtune.aggregate.pairs import Pair
from fedtune.experts.balance import localized, owned, switch
from fedtune.experts.feed_forward import Sizes
from fedtune.experts.gate_table import GateTable
from fedtune.experts.gates import Gate, from_tensors, means
from fedtune.experts.routers import PREFIX, Router, Routing, Term, loaded, router
from fedtune.experts.shapes import Where
from fedtune.experts.state import B_END, GATE, experts_of, gate_of, layer_of
from fedtune.types import Tensors

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

TENSORS = "experts.safetensors"  # <expert>/<tensor>: the experts of a gate, at scale 1


def start(
    names: Sequence[str],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    sizes: Sizes,
    where: Where,
    null: bool,
) -> dict[str, np.ndarray]:
    """The gate before it is trained: linear discriminants of the groups' mean inputs (gates.means); who has
    told none is like all together, and so is nobody (`null`). Even without any."""
    made: dict[str, np.ndarray] = {}
    for layer in where.gated:
        width, here = sizes[layer][0], [names[number] for number in where.living[layer]]
        known = [inputs[name][layer] for name in here if layer in inputs.get(name, {})]
        count = len(here) + null
        weight, bias = np.zeros((count, width), np.float32), np.zeros(count, np.float32)
        if known:
            mean = np.mean(known, axis=0)
            said = [inputs.get(name, {}).get(layer, mean) for name in here] + [mean] * null
            gate = means(said)
            weight, bias = gate.weight.numpy(), gate.bias.numpy()
            weight, bias = weight - weight.mean(0), bias - bias.mean()  # what all have tells nobody apart
        made[f"{GATE}{layer}.weight"], made[f"{GATE}{layer}.bias"] = weight, bias
    return made


def routing_of(table: GateTable) -> Routing:
    return Routing(
        "trained",
        table.keep,
        table.k,
        table.p,
        per=table.per,
        depth=table.depth,
        reads=table.fit == "sums",
    )


def gates_of(tensors: Tensors, of_prefix: bool) -> dict[str, Gate]:
    """By the layer's name in the base."""
    named = {name.removeprefix(GATE).removeprefix(PREFIX): value for name, value in tensors.items()}
    return from_tensors(named, False, of_prefix)


def scaled(tensors: Tensors, scale: float) -> dict[str, np.ndarray]:
    """An expert's pairs at scale 1."""
    return {
        name: (value * np.float32(scale) if name.endswith(B_END) else value)
        for name, value in tensors.items()
    }


def router_of(shared: Tensors, table: GateTable, scale: float, causal: bool) -> Router:
    """Over all experts of a state with a gate; the general one is beneath, in the network itself."""
    experts = {name: scaled(tensors, scale) for name, tensors in experts_of(shared).items()}
    gates = gates_of(gate_of(shared), table.prefix)
    null = table.null
    if table.fit == "sums":  # where clients without an expert were enough to be a group
        null = any(len(gate.bias) > len(experts) for gate in gates.values())
    return router(experts, {}, routing_of(table), causal, null=null, gates=gates)


def stacked(experts: Mapping[str, Tensors]) -> dict[str, np.ndarray]:
    """At each layer the pairs of all experts that live there as one, in the order of their ids."""
    pairs = [split(experts[name])[0] for name in sorted(experts)]
    whole = {
        layer: Pair(
            np.concatenate([some[layer].B for some in pairs if layer in some], 1),
            np.concatenate([some[layer].A for some in pairs if layer in some], 0),
        )
        for layer in sorted({layer for some in pairs for layer in some})
    }
    return join(whole, {})


def apart(
    whole: Tensors, ranks: Sequence[int], living: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of `stacked`; ids are numbers that keep the order."""
    found: dict[str, dict[str, np.ndarray]] = {f"{number:03}": {} for number in range(len(ranks))}
    for name, value in whole.items():
        axis, who = int(name.endswith(B_END)), living[layer_of(name)]
        parts = np.split(value, np.cumsum([ranks[number] for number in who])[:-1], axis)
        for number, part in zip(who, parts, strict=True):
            found[f"{number:03}"][name] = part
    return found


# --- on a network


def put_on(tunable: TunableModel, made: Router) -> None:
    take_off(tunable)
    made.attach(tunable.base.net)
    tunable.routed = made


def take_off(tunable: TunableModel) -> None:
    if tunable.routed is not None:
        tunable.routed.detach()
        tunable.routed = None


@contextmanager
def training_gates(tunable: TunableModel, made: Router) -> Iterator[None]:
    """For a while the router is on the network, and its gates are all that is trained: the tunable model's
    tensors, as gate/<layer>.weight and .bias."""
    whole, named = dict(tunable.named), dict[str, nn.Parameter]()
    made.attach(tunable.base.net)
    for layer, gate in made.gates.items():
        weight, bias = nn.Parameter(gate.weight.clone()), nn.Parameter(gate.bias.clone())
        made.layers[layer].gate = Gate(weight, bias, gate.size, gate.of_prefix)
        named[f"{GATE}{PREFIX}{layer}.weight"], named[f"{GATE}{PREFIX}{layer}.bias"] = weight, bias
    for value in whole.values():
        value.requires_grad_(False)
    tunable.named.clear()
    tunable.named.update({name: named[name] for name in sorted(named)})
    try:
        yield
    finally:
        made.detach()
        tunable.named.clear()
        tunable.named.update({name: value.requires_grad_(True) for name, value in whole.items()})


def balanced(table: GateTable, own: np.ndarray) -> Term | None:
    """The terms that a table asks for; `own` (experts,) is 1 for the group's own expert. None for none. Where
    that expert does not live, there is no localised one."""
    if not (table.balance or (table.tells_own and own.any())):
        return None
    mine = torch.from_numpy(own)

    def term(
        part: torch.Tensor, kept: torch.Tensor, real: torch.Tensor, who: tuple[int, ...]
    ) -> torch.Tensor:
        total = part.new_zeros(())
        if table.balance:
            total = total + table.balance * switch(part, kept, real)
        here = mine[list(who)]
        if here.any():
            shares, here = part[..., : len(who)], here.to(part.device)
            if table.localized:
                total = total + table.localized * localized(shares, real, here)
            if table.owner:
                total = total + table.owner * owned(shares, real, here)
        return total

    return term


def with_terms(made: Router, carries: Callable[[Any, Any], int]) -> Callable[[Any], Any]:
    """A loss with the router's terms, their mean over layers; a loss is a sum over what carries it, and is
    divided by that afterwards."""

    def around(loss_of: Any) -> Any:
        def loss(tunable: Any, batch: Any) -> torch.Tensor:
            value: torch.Tensor = loss_of(tunable, batch)
            if not made.extra:
                return value
            return value + carries(tunable.base.task, batch) * sum(made.extra) / len(made.extra)

        return loss

    return around


# --- on disk


def save_whole(made: Router, experts: Mapping[str, Tensors], folder: Path) -> None:
    """The gate and its experts (at scale 1), so that `load_whole` needs nothing else."""
    made.save(folder)
    flat = {f"{name}/{key}": value for name, some in experts.items() for key, value in some.items()}
    save_file(flat, folder / TENSORS)


def load_whole(folder: Path) -> Router:
    flat, experts = load_file(folder / TENSORS), dict[str, dict[str, np.ndarray]]()
    for name, value in flat.items():
        expert, _, tensor = name.partition("/")
        experts.setdefault(expert, {})[tensor] = value
    return loaded(folder, experts, {})
