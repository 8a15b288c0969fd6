"""What LoRA's two factors ask of an optimiser that other tensors do not.

LoRA+ gives B a greater learning rate than A (Hayou et al. 2024, arXiv:2402.12354, section 4). LoRA-FA, where
A rests, replaces B's gradient by the one whose step of the product s B A is nearest, in least squares, to a
step against the gradient of the weight itself: grad_B (A A^T)^-1 / s^2 (Zhang et al. 2023, arXiv:2308.03303,
as peft's LoraFAOptimizer has it, which rounds that product to bfloat16 where ours is float32). MoSA trains
one drawn slice of the rank in a step (Zhang et al. 2023, arXiv:2312.02923).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fedtune.model.adapters import Lora
from fedtune.model.lora_ranks import A_END, B_END
from fedtune.model.tunable import TunableModel
from fedtune.rng import stream

DAMPING = 1e-8  # on the diagonal of A A^T, as in peft


def faster(tunable: TunableModel) -> tuple[float, frozenset[str]]:
    """LoRA+: what the learning rate is multiplied by, and for which of the trained tensors."""
    ratio = tunable.settings.lr_ratio if isinstance(tunable.settings, Lora) else 1.0
    return ratio, frozenset(name for name in tunable.named if ratio != 1 and name.endswith(B_END))


def project(optimizer: torch.optim.Optimizer, tunable: TunableModel) -> None:
    """LoRA-FA: from now on every step of the optimiser takes projected gradients, if the adapter asks for
    them."""
    if not isinstance(tunable.settings, Lora) or not tunable.settings.projected:
        return
    maps = [(b, inverse_gram(a) / scale**2) for a, b, scale in resting_pairs(tunable)]

    def before_step(*_: Any) -> None:
        for b, made in maps:
            if b.grad is not None:
                b.grad = b.grad @ made

    optimizer.register_step_pre_hook(before_step)


def train_slices(optimizer: torch.optim.Optimizer, tunable: TunableModel, seed: int) -> None:
    """MoSA: from now on every step of the optimiser changes one slice of all pairs' ranks, and that slice's
    moments; the others are as before the step, to the bit."""
    settings = tunable.settings
    if not isinstance(settings, Lora) or settings.slices == 1:
        return
    axes = {
        value: 0 if name.endswith(A_END) else 1
        for name, value in tunable.named.items()
        if name.endswith((A_END, B_END))
    }
    draw, before = stream("slices", seed), dict[int, torch.Tensor]()  # by address

    def held() -> Iterator[tuple[torch.Tensor, int]]:
        for value, axis in axes.items():
            moments = optimizer.state[value].values() if value in optimizer.state else ()
            alike = (one for one in moments if torch.is_tensor(one) and one.shape == value.shape)
            yield from ((one.detach(), axis) for one in (value, *alike))

    def before_step(*_: Any) -> None:
        before.clear()
        before.update({one.data_ptr(): one.clone() for one, _ in held()})

    def after_step(*_: Any) -> None:
        chosen = int(draw.integers(settings.slices))
        for value, axis in held():
            width = value.shape[axis] // settings.slices
            old = before.get(value.data_ptr(), torch.zeros_like(value))  # moments begin as zeros
            old.narrow(axis, chosen * width, width).copy_(value.narrow(axis, chosen * width, width))
            value.copy_(old)

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


def inverse_gram(a: torch.Tensor) -> torch.Tensor:
    """(A A^T)^-1 of A (r, k) as float32 (r, r), computed in float64."""
    wide = a.detach().double()
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.linalg.pinv(wide @ wide.T + DAMPING * eye).float()


def resting_pairs(tunable: TunableModel) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """A, B and scale of every pair of which B alone is trained now."""
    trained = {id(value) for value in tunable.parameters()}
    for module in tunable.net.modules():
        for name, down in getattr(module, "lora_A", {}).items():
            up = module.lora_B[name]
            if id(up.weight) in trained and id(down.weight) not in trained:
                yield down.weight, up.weight, module.scaling[name]
