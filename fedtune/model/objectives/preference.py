"""What losses on pairs share: how likely a model finds the chosen and the rejected response to a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.model.objectives.base import Objective, Predictions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pairs:
    """What a model thinks of B pairs; column 0 is the chosen response, column 1 the rejected one.

    log_p   (B, 2) log-probability of a response behind its prompt, summed over its tokens
    tokens  (B, 2) how many those are; prompt and padding are none of them
    """

    log_p: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, likely: torch.Tensor, there: torch.Tensor) -> Pairs:
        """From log-probabilities (N,) of the tokens that carry loss, and a mask (B, 2, T) of their places."""
        spread = likely.new_zeros(there.shape).masked_scatter(there, likely)
        return cls(spread.sum(-1), there.sum(-1))

    @property
    def per_token(self) -> torch.Tensor:
        """(B, 2) mean log-probability of a token."""
        return self.log_p / self.tokens.clamp_min(1)


class Preference(Objective):
    """A loss that wants the chosen response of each pair to have the greater reward."""

    tasks: ClassVar[frozenset[str]] = frozenset({"preference"})

    def margins(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        """(B,) reward of the chosen response minus that of the rejected one."""
        raise NotImplementedError(f"'{self.loss}' has no reward")

    def losses(self, said: Pairs, reference: Pairs | None) -> torch.Tensor:
        """(B,) the loss of each pair."""
        raise NotImplementedError(f"'{self.loss}' has no formula")

    def summed(self, said: Predictions) -> torch.Tensor:
        from fedtune.model.objectives.terms import log_probabilities

        pairs = Pairs.of(*log_probabilities(said.logits, said.labels))
        without = None
        if said.reference is not None:
            without = Pairs.of(*log_probabilities(said.reference, said.labels))
        return self.losses(pairs, without).sum()


def logistic(margins: torch.Tensor, smoothing: float) -> torch.Tensor:
    """(B,) -log of the probability that a Bradley-Terry model gives to the pair, the labels taken to be wrong
    with probability `smoothing`."""
    from torch.nn.functional import logsigmoid

    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
