"""One decision of a gate for a whole feed-forward block, as in MixLoRA (Li et al. 2024, arXiv:2404.15159).

The gate scores what comes into the block. An expert is the block with its pairs beside each linear layer, and
what experts answer is mixed behind the block:

    y = sum_e share_e W2_e (act(W1_e x) * W3_e x),    W_e = W + B_e A_e

so that an activation sees one expert at a time. What the base says of x is computed once for all; between the
first layer and the last, each token is there once for each expert that has a say (k of them, not K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Decision:
    """Of a block's gate, from its first layer to its last in one pass: whom each token asks in each of its
    slots, the best first, and what their answers weigh.

    head     the layer whose gate decides
    x        what came into the block: its layers read the same tensor
    picks    (slots, ..., experts that live here), 1 for the one who is asked; nobody is all 0
    weights  (slots, ..., 1), which add up to 1 over slots
    """

    head: str
    x: Any = None
    picks: Any = None
    weights: Any = None

    def take(self, x: torch.Tensor, shares: torch.Tensor, slots: int, experts: int) -> None:
        """shares (..., K): of all, nobody last."""
        best, order = shares.topk(slots, -1)
        picks = torch.nn.functional.one_hot(order, shares.shape[-1]).to(shares.dtype)  # (..., slots, K)
        self.x, self.weights = x, best.movedim(-1, 0)[..., None]
        self.picks = picks[..., :experts].movedim(-2, 0)

    def mixed(self, answers: torch.Tensor) -> torch.Tensor:
        """(slots, ..., out) -> (..., out); the block is over."""
        total: torch.Tensor = (self.weights.to(answers.dtype) * answers).sum(0)
        self.x = self.picks = self.weights = None
        return total
