"""Terms of a gate's loss that keep experts in use, or say whose rows these are. `part` (..., K) are the
shares that a gate would give, before some are kept; `real` (..., 1) is 1 for a token and 0 for padding."""

from __future__ import annotations

import torch

DELTA = 0.1  # how much greater a group's own expert may be, as in LoRAMoE's paper


def switch(part: torch.Tensor, kept: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """K sum_e F_e P_e: F_e is the share of what is kept that expert e has, P_e its mean share (Fedus et al.
    2022, arXiv:2101.03961, eq. 4). 1 where all are used alike, K where one has everything."""
    used = (kept * real).flatten(0, -2).sum(0).detach()
    mean = (part * real).flatten(0, -2).sum(0) / real.sum().clamp_min(1)
    return part.shape[-1] * (used / used.sum().clamp_min(1) * mean).sum()


def owned(part: torch.Tensor, real: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The cross entropy of the group's own expert (`own` is 1) among the shares: nats, mean over tokens."""
    missed = -(part * own).sum(-1, keepdim=True).clamp_min(1e-30).log()
    return (missed * real).sum() / real.sum().clamp_min(1)


def localized(part: torch.Tensor, real: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation of experts' weighted shares, text by text (B, T, K): 0 where the
    shares of the group's own expert (`own` is 1) and of another one are as 1 + DELTA to 1 - DELTA.

    Dou et al. 2024, arXiv:2312.09979, eq. 7, divided by the mean once more, as their code does. They multiply
    an expert's own share by 1 + DELTA, which leaves it the smaller one; here it is divided, as the text says.
    """
    shares = (part * real).sum(-2) / real.sum(-2).clamp_min(1)  # (B, K)
    weighted = (shares / (1 + DELTA * (2 * own - 1))).flatten()
    return weighted.var(unbiased=False) / weighted.mean().square().clamp_min(1e-10)
