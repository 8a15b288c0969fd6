"""LoRA factors that begin as a part of the weight itself, beside a base that stays as everybody holds it.

PiSSA (Meng et al. 2024, arXiv:2404.02948): B0 = U sqrt(S) and A0 = sqrt(S) V^T of the greatest singular
values, divided by the scale. OLoRA (Büyükakyüz 2024, arXiv:2406.01775): the first columns of Q and rows of R
of W = Q R. CorDA (Yang et al. 2024, arXiv:2406.05223, its instruction-previewed mode): B0 = U sqrt(S) and
A0 = sqrt(S) V^T C^-1 of the greatest singular values of W C, C being the mean products of the layer's inputs,
which clients tell as sums (lora_inputs.py). All three papers take s B0 A0 out of the weight. Here the
coordinator computes B0 and A0 once and gives every client the pair (-s B0, A0) as a residual of their rank,
which is never trained: the first model is the base, no client decomposes anything, and an export is stock
LoRA of twice the rank, as peft converts such starts (`path_initial_model_for_weight_conversion`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedtune.aggregate.elementwise import leading
from fedtune.errors import FedtuneError

if TYPE_CHECKING:
    from fedtune.methods.fedpeft_settings import FedPEFTSettings
    from fedtune.model.tunable import TunableModel

LoraStart = Literal["zero", "pissa", "olora", "eva", "corda"]
OF_WEIGHTS = ("pissa", "olora")  # starts that follow from the weights alone
TAKES_OUT = (*OF_WEIGHTS, "corda")  # something of the weight: there is a residual
DAMPING = 0.01  # CorDA's, of the mean variance
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
        made |= taken_out(module, b, a, scale)
    return made


def taken_out(module: str, b: np.ndarray, a: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """A pair by its names, and the residual that undoes it."""
    down = (b * -scale).astype(np.float32)
    return {
        f"{module}.residual_A": a,
        f"{module}.residual_B": down,
        module + A_END: a.copy(),
        module + B_END: -(down / np.float32(scale)),  # as it is undone
    }


def principal(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """PiSSA's B0 (d, rank) and A0 (rank, k). Of a weight with fewer directions, the last are zero."""
    of = leading(weight, rank)
    root = np.sqrt(of.S[:rank] / scale)
    b, a = of.U[:, :rank] * root, root[:, None] * of.Vt[:rank]
    more = rank - root.size
    return np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0))).astype(np.float32)


def oriented(
    weight: np.ndarray, second: np.ndarray, rank: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """CorDA's B0 (d, rank) and A0 (rank, k): the greatest singular directions of W C, where C (k, k) are the
    mean products of a layer's inputs, divided by their mean variance and damped; A0 undoes C again."""
    c = (second + second.T) / 2
    c = c / max(float(np.mean(np.diag(c))), 1e-30) + DAMPING * np.eye(len(c))
    b, a = principal(weight @ c, rank, scale)
    return b, np.linalg.solve(c, a.astype(np.float64).T).T.astype(np.float32)


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


def check_weights(tunable: TunableModel, rank: int) -> None:
    """Raises M306 for a layer that cannot be decomposed, before anything is asked of clients."""
    for name, value in tunable.named.items():
        if name.endswith(B_END):
            module = name.removesuffix(B_END)
            weight_of(tunable, module, (value.shape[0], tunable.named[module + A_END].shape[1]), rank)


def begun_pairs(
    tunable: TunableModel, said: Mapping[str, np.ndarray], rank: int, scale: float
) -> dict[str, np.ndarray]:
    """CorDA's first factors and the residual, from the weights and `said`, <module>.second (k, k)."""
    made: dict[str, np.ndarray] = {}
    for name in tunable.named:
        if name.endswith(B_END):
            module = name.removesuffix(B_END)
            second = said[f"{module}.second"].astype(np.float64)
            weight = weight_of(tunable, module, (tunable.named[name].shape[0], len(second)), rank)
            made |= taken_out(module, *oriented(weight, second, rank, scale), scale)
    return made


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
    if s.lora_start not in OF_WEIGHTS and any(step.spends for step in recipe.chain):
        expected = "no sums over clients' inputs, which no noise covers"
        yield f"{found} with [[chain]] step = 'private'", expected, zero
    if s.lora_rank_by_client or s.lora_alpha_by_client:
        expected = "one rank and scale for all: starts that differ cannot be averaged"
        yield f"{found} with clients of different ranks or alphas", expected, zero
    if s.start_from:
        yield f"{found} with method.start_from", "one start", "remove one of them"
    if s.lora_start not in TAKES_OUT:
        return
    if s.adapter.dora:
        yield f"{found} with method.adapter.dora", "one of them", zero
    if s.train.weight_decay:
        yield f"{found} with method.train.weight_decay", "no decay, which would wear down the residual", zero
    if recipe.downlink.lossy or recipe.downlink.remembers:
        yield f"{found} with [downlink]", "no [downlink]: the residual must arrive as it is", zero


def residual_rank(s: FedPEFTSettings) -> int:
    """Of what the start carries beside the adapter."""
    return s.lora.rank if s.lora_start in TAKES_OUT else 0
