"""Simple preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.model.objectives.preference import Pairs, Preference, logistic

if TYPE_CHECKING:
    import torch


class Simpo(Preference):
    """loss = "simpo": -log sigmoid(margin - gamma), where the reward of a response is beta times the mean
    log-probability of a token (Meng et al. 2024, arXiv:2405.14734, eq. 6). No reference."""

    loss: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    """Scale of the reward."""
    gamma: float = Field(1.0, ge=0)
    """Margin that is wanted."""
    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round."""

    def margins(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        rewards = self.beta * said.per_token
        return rewards[:, 0] - rewards[:, 1]

    def losses(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        return logistic(self.margins(said, reference) - self.gamma, self.smoothing)
