"""Odds ratio preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.model.objectives.preference import Pairs, Preference

if TYPE_CHECKING:
    import torch

SURE = -1e-6  # the highest log-probability whose odds are still a number in float32


class Orpo(Preference):
    """loss = "orpo": cross entropy of the chosen response, a mean over its tokens, and `beta` times -log
    sigmoid of the log odds ratio of the two responses (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7). No
    reference. The reward is the mean log-probability of a token."""

    loss: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, ge=0)
    """Weight of the odds ratio, the paper's lambda; 0 is cross entropy of the chosen response."""

    def margins(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        return said.per_token[:, 0] - said.per_token[:, 1]

    def losses(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        from torch.nn.functional import logsigmoid

        odds = log_odds(said.per_token)
        return -said.per_token[:, 0] - self.beta * logsigmoid(odds[:, 0] - odds[:, 1])


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p))."""
    sure = log_p.clamp_max(SURE)
    return sure - (-sure.expm1()).log()
