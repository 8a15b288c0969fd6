"""A recipe's objective on a client's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedtune.errors import FedtuneError
from fedtune.model.batch_choice import evaluating
from fedtune.model.encode import Encoded
from fedtune.model.loss import hidden_of, inputs_of, logits_of, summed_loss
from fedtune.model.loss_pieces import in_pieces, likely_in_pieces
from fedtune.model.objectives import Context, Objective, Predictions, Preference
from fedtune.model.objectives.base import IGNORED
from fedtune.model.objectives.preference import Pairs
from fedtune.model.objectives.terms import log_probabilities
from fedtune.model.packing import OWNERS, texts_apart
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

Loss = Callable[[TunableModel, dict[str, torch.Tensor]], torch.Tensor]  # of a batch, summed


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a batch, summed over what carries it. Cross entropy itself is taken as scores take it, in
    pieces where logits are large, and so are losses on pairs; other objectives need all logits of a batch at
    once."""

    objective: Objective
    context: Context

    @classmethod
    def of(cls, objective: Objective, tunable: TunableModel, encoded: Encoded) -> TrainingLoss:
        classes = 0 if objective.plain or tunable.base.task in LM_TASKS else len(tunable.base.labels)
        return cls(objective, Context.of(encoded, classes))

    def __call__(self, tunable: TunableModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.objective.plain:
            return summed_loss(tunable, batch)[0]
        if isinstance(self.objective, Preference):
            return self.objective.losses(*pairs_of(self.objective, tunable, batch)).sum()
        reference = None
        if self.objective.refers:
            with torch.no_grad(), switched_off(tunable):
                reference = logits_of(tunable, *inputs_of(tunable, batch))[0].float()
        logits, labels = logits_of(tunable, *inputs_of(tunable, batch))
        return self.said(logits.float(), labels, reference, batch.get(OWNERS))

    def said(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        reference: torch.Tensor | None,
        owners: torch.Tensor | None,
    ) -> torch.Tensor:
        """The objective's sum over what was predicted; texts of packed rows are taken apart for it."""
        if owners is not None:
            given = (logits,) if reference is None else (logits, reference)
            labels, logits, *more = texts_apart(owners, labels, *given)
            reference = more[0] if more else None
        return self.objective.summed(Predictions(logits, labels, self.context, reference))


def pairs_of(
    objective: Preference, tunable: TunableModel, batch: dict[str, torch.Tensor]
) -> tuple[Pairs, Pairs | None]:
    """What the model thinks of a batch of pairs, and what it thinks of them without its adapter, where the
    objective compares with that: then nothing is dropped and nothing has a gradient. Raises M306."""
    reference = None
    if objective.refers:
        with torch.no_grad(), switched_off(tunable), evaluating(tunable):
            reference = likely_pairs(tunable, batch)
    return likely_pairs(tunable, batch), reference


def likely_pairs(tunable: TunableModel, batch: dict[str, torch.Tensor]) -> Pairs:
    arguments, labels = inputs_of(tunable, batch)
    if in_pieces(tunable.base, labels.numel()):
        hidden, aligned = hidden_of(tunable, arguments, labels)
        return Pairs.of(likely_in_pieces(tunable.base.net, hidden, aligned), aligned != IGNORED)
    logits, labels = logits_of(tunable, arguments, labels)
    return Pairs.of(*log_probabilities(logits.float(), labels))


@contextmanager
def switched_off(tunable: TunableModel) -> Iterator[None]:
    """The network without its adapter. Raises M306 for a kind that has no switch.

    By peft's switches of the layers: its `disable_adapter` describes every layer in words first, which takes
    longer than a small model's forward pass, and both leave all weights of an adapter to be trained.
    """
    if tunable.settings is None:
        yield
        return
    if not tunable.settings.switches_off:
        raise FedtuneError(
            "M306",
            f"a loss that refers to the model without its adapter, with kind '{tunable.kind}'",
            "lora or ia3",
            "choose one of them, or another method.train.objective",
        )
    frozen = [parameter for parameter in tunable.net.parameters() if not parameter.requires_grad]
    tunable.net.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        tunable.net.base_model.enable_adapter_layers()
        for parameter in frozen:
            parameter.requires_grad_(False)
