"""Focal loss: what is already right counts less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.model.objectives.base import Objective, Predictions

if TYPE_CHECKING:
    import torch


class Focal(Objective):
    """loss = "focal": -(1 - p)^gamma log p(label) (Lin et al. 2017, eq. 4)."""

    loss: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0)
    """0 is the cross entropy."""

    @property
    def plain(self) -> bool:
        return not self.gamma

    def summed(self, said: Predictions) -> torch.Tensor:
        from torch import expm1

        from fedtune.model.objectives.terms import log_probabilities

        likely, _ = log_probabilities(said.logits, said.labels)
        return -((-expm1(likely)).clamp_min(0) ** self.gamma * likely).sum()
