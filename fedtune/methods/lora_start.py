"""LoRA factors that begin as a part of the weight itself, beside a base that stays as everybody holds it.

PiSSA (Meng et al. 2024, arXiv:2404.02948): B0 = U sqrt(S) and A0 = sqrt(S) V^T of the greatest singular
values, divided by the scale. OLoRA (Büyükakyüz 2024, arXiv:2406.01775): the first columns of Q and rows of R
of W = Q R. Both papers take s B0 A0 out of the weight. Here the coordinator computes B0 and A0 once and gives
every client the pair (-s B0, A0) as a residual of their rank, which is never trained: the first model is the
base, no client decomposes anything, and an export is stock LoRA of twice the rank, as peft converts such
starts (`path_initial_model_for_weight_conversion`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedtune.aggregate.elementwise import leading
from fedtune.errors import FedtuneError

if TYPE_CHECKING:
    from fedtune.methods.fedpeft_settings import FedPEFTSettings
    from fedtune.model.tunable import TunableModel

LoraStart = Literal["zero", "pissa", "olora", "eva"]
OF_WEIGHTS = ("pissa", "olora")  # starts that take something out of the weight
A_END, B_END = ".lora_A.weight", ".lora_B.weight"


def started_pairs(kind: LoraStart, tunable: TunableModel, rank: int, scale: float) -> dict[str, np.ndarray]:
    """First factors by their names, and the residual that takes them out of the weight again, as
    <module>.residual_A (rank, k) and <module>.residual_B (d, rank); {} for starts that need none. Raises M306
    for weights that are no matrices of real numbers, or too small."""
    made: dict[str, np.ndarray] = {}
    for name in tunable.named if kind in OF_WEIGHTS else ():
        if not name.endswith(B_END):
            continue
        module = name.removesuffix(B_END)
        d, k = tunable.named[name].shape[0], tunable.named[module + A_END].shape[1]
        weight = weight_of(tunable, module, (d, k), rank)
        b, a = (principal if kind == "pissa" else orthogonal)(weight, rank, scale)
        down = (b * -scale).astype(np.float32)
        made[f"{module}.residual_A"], made[f"{module}.residual_B"] = a, down
        made[module + A_END], made[module + B_END] = a.copy(), -(down / np.float32(scale))  # as it is undone
    return made


def principal(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """PiSSA's B0 (d, rank) and A0 (rank, k). Of a weight with fewer directions, the last are zero."""
    of = leading(weight, rank)
    root = np.sqrt(of.S[:rank] / scale)
    b, a = of.U[:, :rank] * root, root[:, None] * of.Vt[:rank]
    more = rank - root.size
    return np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0))).astype(np.float32)


def orthogonal(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """OLoRA's B0 (d, rank) and A0 (rank, k), whatever the scale; R's diagonal is made positive, which leaves
    nothing open."""
    q, r = np.linalg.qr(weight)
    signs = np.where(np.diag(r) < 0, -1.0, 1.0)
    q, r = q[:, : signs.size] * signs, r[: signs.size] * signs[:, None]
    return q[:, :rank], r[:rank].astype(np.float32)


def weight_of(tunable: TunableModel, module: str, shape: tuple[int, int], rank: int) -> np.ndarray:
    """An adapted layer's own weight (d, k), as float64."""
    from fedtune.model.adapters.wrap import plain

    weight = tunable.base.weights.get(plain(f"{module}.weight"))
    fits = weight is not None and weight.is_floating_point() and sorted(weight.shape) == sorted(shape)
    if weight is None or not fits or rank > min(shape):
        found = f"method.lora_start with '{plain(module)}' of {shape[0]} x {shape[1]}"
        raise FedtuneError(
            "M306",
            found,
            f"a matrix of real numbers, of rank {rank} or more",
            "set method.lora_start = 'zero', or choose other method.adapter.targets or a lower rank",
        )
    value: np.ndarray = weight.detach().to("cpu").double().numpy()
    inputs_first = type(tunable.base.net.get_submodule(plain(module)).get_base_layer()).__name__ == "Conv1D"
    return value.T if inputs_first else value


def start_conflicts(s: FedPEFTSettings, recipe: Any) -> Iterator[tuple[str, str, str]]:
    """For a table's `conflicts`."""
    if s.lora_start == "zero":
        return
    found, rule = f"method.lora_start = '{s.lora_start}'", recipe.aggregate
    zero = "set method.lora_start = 'zero', or change the other"
    if s.adapter.kind != "lora":
        yield f"{found} with method.adapter.kind = '{s.adapter.kind}'", "kind = 'lora'", "change one of them"
        return
    pair = ("blocks.0.x.lora_A.weight", "blocks.0.x.lora_B.weight")
    if rule.carries or rule.core or rule.stays(pair) or rule.trains(pair, 1) | rule.trains(pair, 2) < {*pair}:
        expected = "a rule under which all clients train both factors and nothing else is carried"
        yield f"{found} with aggregate.rule = '{rule.rule}'", expected, zero
    if s.train.private.max_grad_norm:
        expected = "no sums over rows as they are, and no noise on a residual"
        yield f"{found} with method.train.private", expected, zero
    if s.lora_rank_by_client or s.lora_alpha_by_client:
        expected = "one rank and scale for all: starts that differ cannot be averaged"
        yield f"{found} with clients of different ranks or alphas", expected, zero
    if s.start_from:
        yield f"{found} with method.start_from", "one start", "remove one of them"
    if s.lora_start not in OF_WEIGHTS:
        return
    if s.adapter.dora:
        yield f"{found} with method.adapter.dora", "one of them", zero
    if s.train.weight_decay:
        yield f"{found} with method.train.weight_decay", "no decay, which would wear down the residual", zero
    if recipe.downlink.lossy or recipe.downlink.remembers:
        yield f"{found} with [downlink]", "no [downlink]: the residual must arrive as it is", zero


def residual_rank(s: FedPEFTSettings) -> int:
    """Of what the start carries beside the adapter."""
    return s.lora.rank if s.lora_start in OF_WEIGHTS else 0
