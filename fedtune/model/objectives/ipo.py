"""Identity preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.model.objectives.preference import Pairs, Preference

if TYPE_CHECKING:
    import torch


class Ipo(Preference):
    """loss = "ipo": (margin - 1 / (2 beta))^2, where the reward of a response is the mean over its tokens of
    log(p / p_reference), and the reference is the model without its adapter (Azar et al. 2023,
    arXiv:2310.12036, eq. 17): unlike DPO's, the margin has a goal that it stops at."""

    loss: Literal["ipo"] = "ipo"
    beta: float = Field(0.1, gt=0)
    """The paper's tau: the larger, the smaller the margin that is wanted."""

    @property
    def refers(self) -> bool:
        return True

    def margins(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        assert reference is not None
        rewards = said.per_token - reference.per_token
        return rewards[:, 0] - rewards[:, 1]

    def losses(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        return (self.margins(said, reference) - 1 / (2 * self.beta)) ** 2
