"""How a run's state holds experts: the general one under its own names, so that without others it is
fedpeft's state to the bit; the others as experts/<id>/<tensor>; who shares which, and sketches, are kept at
the server."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from fedtune.rng import stream
from fedtune.schema import Schema
from fedtune.types import State, Tensors

EXPERTS, MEMBERS, SKETCH, MADE = "experts/", "members/", "sketch/", "experts_made"
INPUTS = "inputs/"  # inputs/<id>/<layer>, kept: mean and mean square of what comes into it
GATE = "gate/"  # gate/<layer>.weight (experts, in) and .bias, experts in the order of their ids
OWN = "expert/"  # an expert's tensors in a message, beside the general one's
A_END, B_END = ".lora_A.weight", ".lora_B.weight"


def is_pair(name: str) -> bool:
    return name.endswith((A_END, B_END))


def general_of(shared: Tensors) -> dict[str, np.ndarray]:
    return {name: value for name, value in shared.items() if not name.startswith((EXPERTS, GATE))}


def gate_of(shared: Tensors) -> dict[str, np.ndarray]:
    """The trained gate's tensors; {} where there is none."""
    return {name: value for name, value in shared.items() if name.startswith(GATE)}


def experts_of(shared: Tensors) -> dict[str, dict[str, np.ndarray]]:
    """id -> its tensors, under the names of the adapter."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in shared.items():
        if name.startswith(EXPERTS):
            expert, _, tensor = name.removeprefix(EXPERTS).partition("/")
            found.setdefault(expert, {})[tensor] = value
    return {expert: found[expert] for expert in sorted(found)}


def below(prefix: str, tensors: Tensors) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in tensors.items()}


def groups_of(kept: Tensors) -> dict[str, tuple[int, ...]]:
    """id -> numbers of the clients that share it."""
    return {
        name.removeprefix(MEMBERS): tuple(int(client) for client in value)
        for name, value in sorted(kept.items())
        if name.startswith(MEMBERS)
    }


def sketches_of(kept: Tensors) -> dict[int, np.ndarray]:
    return {int(name.removeprefix(SKETCH)): value for name, value in kept.items() if name.startswith(SKETCH)}


def inputs_of(kept: Tensors) -> dict[str, dict[str, np.ndarray]]:
    """id -> layer -> (mean, mean square) of its inputs, on the rows of the expert's clients."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in kept.items():
        if name.startswith(INPUTS):
            expert, _, layer = name.removeprefix(INPUTS).partition("/")
            found.setdefault(expert, {})[layer] = value
    return found


def with_groups(
    kept: Tensors, groups: Mapping[str, tuple[int, ...]], sketches: Mapping[int, np.ndarray], made: int
) -> dict[str, np.ndarray]:
    """What is kept, with these groups and sketches in the place of those before."""
    rest = {name: value for name, value in kept.items() if not name.startswith((MEMBERS, SKETCH, MADE))}
    rest |= {MEMBERS + name: np.array(sorted(members), np.int64) for name, members in groups.items()}
    rest |= {f"{SKETCH}{client}": value for client, value in sketches.items()}
    return rest | ({MADE: np.array(made, np.int64)} if made else {})


def made_so_far(kept: Tensors) -> int:
    return int(kept[MADE]) if MADE in kept else 0


def joined(
    general: Tensors, experts: Mapping[str, Tensors], kept: Tensors, gate: Tensors | None = None
) -> State:
    shared = {**general, **(gate or {})}
    for expert, tensors in experts.items():
        shared |= below(f"{EXPERTS}{expert}/", tensors)
    return State(shared, kept)


def fresh(general: Tensors, seed: int) -> dict[str, np.ndarray]:
    """An expert before its first round, shaped as the general one's pairs: A as peft draws it, from the
    run's seed and alike for all experts; B is zero, so that it changes nothing yet."""
    return {
        name: fresh_a(name, value.shape, seed) if name.endswith(A_END) else np.zeros_like(value)
        for name, value in sorted(general.items())
        if is_pair(name)
    }


def fresh_a(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    bound = 1 / math.sqrt(shape[1])
    return stream(f"expert {name}", seed).uniform(-bound, bound, shape).astype(np.float32)


def layer_of(name: str) -> str:
    """The layer of a factor."""
    return name.removesuffix(A_END).removesuffix(B_END)


def layers_of(given: Schema) -> list[tuple[str, tuple[int, ...]]]:
    """Adapted layers, and the shapes of their A."""
    return [(name.removesuffix(A_END), shape) for name, shape in given.entries if name.endswith(A_END)]


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Adapted layers, and the widths of what comes in and goes out; 0 where A does not travel."""
    return {
        layer: (shapes.get(layer + A_END, (0, 0))[1], shape[0])
        for name, shape in shapes.items()
        if (layer := name.removesuffix(B_END)) != name
    }


def only(schema: Schema, names: Collection[str]) -> Schema:
    return Schema(tuple(entry for entry in schema.entries if entry[0] in names))


def rank_of(tensors: Tensors) -> int:
    """Of all pairs of an expert, which are of one."""
    return int(next(value.shape[1] for name, value in tensors.items() if name.endswith(B_END)))
