"""Balance within a client: a class counts by itself, not by its rows; a text by itself, not by its length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedtune.model.objectives.base import Context, Objective, Predictions

if TYPE_CHECKING:
    import torch


class Balanced(Objective):
    """loss = "balanced": cross entropy in which every class of the client weighs the same, whatever its rows;
    of a language model, every text of a batch, whatever its length (MFTCoder's balance by data, Liu et al.
    2023, arXiv:2311.02303). The weights of a client's rows are 1 on average."""

    loss: Literal["balanced"] = "balanced"

    def summed(self, said: Predictions) -> torch.Tensor:
        from fedtune.model.objectives.terms import log_probabilities

        labels = said.labels
        likely, there = log_probabilities(said.logits, labels)
        if labels.ndim == 1:
            weights = class_weights(said.context, likely)[labels[there]]
        else:  # tokens of a text share what all tokens have, divided by the texts
            tokens = there.sum(-1)
            share = there.sum() / (tokens > 0).sum().clamp_min(1)
            weights = (share / tokens.clamp_min(1))[:, None].expand(labels.shape)[there]
        return -(weights.to(likely.dtype) * likely).sum()


def class_weights(context: Context, like: torch.Tensor) -> torch.Tensor:
    """(C,): rows / (classes that are there * rows of the class); 0 for a class that is not."""
    counts = like.new_tensor(context.counts)
    weights = counts.sum() / ((counts > 0).sum() * counts.clamp_min(1))
    return weights * (counts > 0)
