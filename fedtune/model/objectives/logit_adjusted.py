"""Logit adjustment: a client's skewed labels do not become the model's prior."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedtune.model.objectives.base import Objective, Predictions

if TYPE_CHECKING:
    import torch


class LogitAdjusted(Objective):
    """loss = "logit-adjusted": cross entropy of logits + tau log(share of the class in the client's rows)
    (Menon et al. 2021; at clients: FedLC, Zhang et al. 2022). Only while training; a class that the
    client does not have counts as a tenth of a row."""

    loss: Literal["logit-adjusted"] = "logit-adjusted"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "image-classify"})
    tau: float = Field(1.0, ge=0)
    """0 is the cross entropy."""

    @property
    def plain(self) -> bool:
        return not self.tau

    def summed(self, said: Predictions) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        shares = said.logits.new_tensor([max(count, 0.1) for count in said.context.counts])
        shifted = said.logits + self.tau * (shares / shares.sum()).log()
        return cross_entropy(shifted, said.labels, reduction="sum")
