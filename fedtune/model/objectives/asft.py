"""Losses whose tokens weigh by how likely they are: DFT, and ASFT, which is anchored to the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedtune.model.objectives.base import Context, Objective

if TYPE_CHECKING:
    import torch

LANGUAGE = frozenset({"causal-lm", "instruct"})


class Dft(Objective):
    """loss = "dft": sg(p) (-log p), where sg stops the gradient (Wu et al. 2025, arXiv:2508.05629, eq. 9)."""

    loss: Literal["dft"] = "dft"
    tasks: ClassVar[frozenset[str]] = LANGUAGE
    by_values: ClassVar[bool] = False

    def summed(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        context: Context,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from fedtune.model.objectives.terms import log_probabilities

        said, _ = log_probabilities(logits, labels)
        return -(said.detach().exp() * said).sum()


class Asft(Dft):
    """loss = "asft": DFT, and `anchor` times KL(reference || model), where the reference is the model without
    its adapter (ASFT, arXiv:2509.23753, eq. 10): one more forward pass, no second model in memory."""

    loss: Literal["asft"] = "asft"  # type: ignore[assignment]
    anchor: float = Field(0.05, ge=0)
    """Weight of the divergence; 0 is dft."""

    @property
    def refers(self) -> bool:
        return bool(self.anchor)

    def summed(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        context: Context,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from torch.nn.functional import kl_div

        from fedtune.model.objectives.terms import log_probabilities

        total = super().summed(logits, labels, context)
        if reference is None:
            return total
        _, there = log_probabilities(logits, labels)
        now, before = logits[there].log_softmax(-1), reference[there].log_softmax(-1)
        return total + self.anchor * kl_div(now, before, reduction="sum", log_target=True)
