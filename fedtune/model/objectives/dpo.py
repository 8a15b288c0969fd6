"""Direct preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.model.objectives.preference import Pairs, Preference, logistic

if TYPE_CHECKING:
    import torch


class Dpo(Preference):
    """loss = "dpo": -log sigmoid of the margin, where the reward of a response is beta log(p / p_reference),
    and the reference is the model without its adapter (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): one
    more forward pass, no second model in memory."""

    loss: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """How dear it is to move away from the reference."""
    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round (conservative DPO)."""

    @property
    def refers(self) -> bool:
        return True

    def margins(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        assert reference is not None
        rewards = self.beta * (said.log_p - reference.log_p)
        return rewards[:, 0] - rewards[:, 1]

    def losses(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        return logistic(self.margins(said, reference), self.smoothing)
