"""What FedPEFT's state holds beside the adapter, by name: what clients keep at home, a residual, a core."""

from __future__ import annotations

import numpy as np

from fedtune.aggregate import Pair, join, split
from fedtune.aggregate.fedsb import Core, as_pair
from fedtune.aggregate.fedsb import start as first_core
from fedtune.schema import Schema
from fedtune.types import State, Tensors

CORE = ".lora_R.weight"  # Fed-SB's matrix between the fixed factors
# in a client's state: what the rule leaves at home; in the server's: the mean of those after the last round
OWN = "own/"


def own_of(state: State) -> dict[str, np.ndarray]:
    """What clients keep at home, as the server last heard of it."""
    return {name.removeprefix(OWN): value for name, value in state.kept.items() if name.startswith(OWN)}


def apart(tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The adapter, and the residual beside it."""
    residual = {name: value for name, value in tensors.items() if ".residual_" in name}
    return {name: value for name, value in tensors.items() if name not in residual}, residual


def carried(schema: Schema, extra: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a residual of this rank beside an adapter; none where it is 0."""
    if not extra:
        return []
    a_names = [
        (name.removesuffix(".lora_A.weight"), shape)
        for name, shape in schema.entries
        if name.endswith(".lora_A.weight")
    ]
    return [
        *((f"{module}.residual_A", (extra, shape[1])) for module, shape in a_names),
        *(
            (f"{module}.residual_B", (schema.shapes[f"{module}.lora_B.weight"][0], extra))
            for module, _ in a_names
        ),
    ]


def core_of(name: str) -> str:
    return name.replace(".lora_A.weight", CORE)


def with_core(mean: Tensors, seat: tuple[int, float]) -> dict[str, np.ndarray]:
    """Fed-SB's fixed B and A and the first R, from the mean of one round of plain LoRA."""
    pairs, rest = split(mean)
    cores = {
        module: first_core(Pair(np.multiply(pair.B, seat[1], dtype=np.float64), pair.A), *seat)
        for module, pair in pairs.items()
    }
    fixed = join({module: Pair(core.B, core.A) for module, core in cores.items()}, rest)
    return fixed | {f"{module}{CORE}": core.R for module, core in cores.items()}


def without_core(tensors: Tensors) -> dict[str, np.ndarray]:
    """The stock adapter (B R, A); what has no core already is one."""
    if not any(name.endswith(CORE) for name in tensors):
        return dict(tensors)
    plain = {name: value for name, value in tensors.items() if not name.endswith(CORE)}
    pairs, rest = split(plain)
    return join(
        {module: as_pair(Core(pair.B, tensors[f"{module}{CORE}"], pair.A)) for module, pair in pairs.items()},
        rest,
    )


def padded(residual: Tensors, extra: int) -> dict[str, np.ndarray]:
    """A residual at its full extra rank, so that its shape is known before it arrives."""
    out = {}
    for name, value in residual.items():
        down = name.endswith("_A")
        more = extra - value.shape[0 if down else 1]
        out[name] = np.pad(value, ((0, more), (0, 0)) if down else ((0, 0), (0, more)))
    return out
