"""Cross entropy, with label smoothing if asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.model.objectives.base import Objective, Predictions

if TYPE_CHECKING:
    import torch


class CrossEntropy(Objective):
    """loss = "cross-entropy": -log p(label)."""

    loss: Literal["cross-entropy"] = "cross-entropy"
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing: so much of the probability is wanted evenly from all classes (Szegedy et al. 2016,
    section 7)."""

    @property
    def plain(self) -> bool:
        return not self.smoothing

    def summed(self, said: Predictions) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        flat = said.logits.reshape(-1, said.logits.shape[-1])
        return cross_entropy(flat, said.labels.reshape(-1), reduction="sum", label_smoothing=self.smoothing)
