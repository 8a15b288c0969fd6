"""Losses whose tokens weigh by how likely they are: DFT, and ASFT, which is anchored to the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedtune.model.objectives.base import Objective, Predictions
from fedtune.types import TOKEN_TASKS

if TYPE_CHECKING:
    import torch


class Dft(Objective):
    """loss = "dft": sg(p) (-log p), where sg stops the gradient (Wu et al. 2025, arXiv:2508.05629)."""

    loss: Literal["dft"] = "dft"
    tasks: ClassVar[frozenset[str]] = frozenset(TOKEN_TASKS)
    by_values: ClassVar[bool] = False

    def summed(self, said: Predictions) -> torch.Tensor:
        from fedtune.model.objectives.terms import log_probabilities

        likely, _ = log_probabilities(said.logits, said.labels)
        return -(likely.detach().exp() * likely).sum()


class Asft(Dft):
    """loss = "asft": DFT, and `anchor` times KL(reference || model), where the reference is the model without
    its adapter (ASFT, arXiv:2509.23753): one more forward pass, no second model in memory."""

    loss: Literal["asft"] = "asft"  # type: ignore[assignment]
    anchor: float = Field(0.05, ge=0)
    """Weight of the divergence; 0 is dft."""

    @property
    def refers(self) -> bool:
        return bool(self.anchor)

    def summed(self, said: Predictions) -> torch.Tensor:
        from torch.nn.functional import kl_div

        from fedtune.model.objectives.terms import log_probabilities

        total = super().summed(said)
        if said.reference is None:
            return total
        _, there = log_probabilities(said.logits, said.labels)
        now, before = said.logits[there].log_softmax(-1), said.reference[there].log_softmax(-1)
        return total + self.anchor * kl_div(now, before, reduction="sum", log_target=True)
