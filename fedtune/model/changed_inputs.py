"""A recipe's changes of the input side on a client's batches.

What is drawn for an example depends on the seed, the step and the example alone: not on the batch that it is
in, nor on how often the batch is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.model.encode import Encoded
from fedtune.model.input_changes import InputChange, Vocabulary
from fedtune.model.objectives.base import IGNORED
from fedtune.model.packing import owners_of
from fedtune.model.training_loss import Loss
from fedtune.model.tunable import TunableModel
from fedtune.rng import seed_of, stream

SEEDS = "input_seeds"  # of a batch: (examples,) what the noise of each is drawn from; no network sees it
Batch = dict[str, torch.Tensor]


def without_seeds(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != SEEDS}


@dataclass(frozen=True)
class ChangedInputs:
    """changes: those that change something; with none, everything is what it was."""

    changes: tuple[InputChange, ...]
    vocabulary: Vocabulary
    seed: int

    @classmethod
    def of(cls, changes: Sequence[InputChange], tunable: TunableModel, seed: int) -> ChangedInputs:
        """Raises C104 for a token that the model does not have."""
        made = cls(tuple(c for c in changes if not c.idle), Vocabulary(tunable.base.tokenizer), seed)
        for change in made.changes:
            change.require(made.vocabulary, tunable.base.name)
        return made

    def at(self, encoded: Encoded, step: int, share: float) -> Encoded:
        """The examples as they are read in one step of training, when so much of the run is done."""
        if not self.changes:
            return encoded

        def collate(indices: Sequence[int]) -> Batch:
            batch = encoded.collate(indices)
            ids = batch["input_ids"].numpy().copy()
            labels, shown = batch["labels"].numpy(), batch["attention_mask"].numpy() > 0
            for place, index in enumerate(indices):
                own = shown[place]
                answered = labels[place, own] != IGNORED if labels.ndim == 2 else np.zeros(own.sum(), bool)
                for number, change in enumerate(self.changes):
                    draw = stream("input tokens", self.seed, step, index, number)
                    ids[place, own] = change.tokens(ids[place, own], answered, share, draw, self.vocabulary)
            seeds = [seed_of("input noise", self.seed, step, index) for index in indices]
            return batch | {"input_ids": torch.from_numpy(ids), SEEDS: torch.tensor(seeds)}

        return replace(encoded, collate=collate)

    def around(self, loss_of: Loss) -> Loss:
        """The loss of batches that `at` made."""
        if not any(change.is_noise for change in self.changes):
            return lambda tunable, batch: loss_of(tunable, without_seeds(batch))

        def changed(tunable: TunableModel, batch: Batch) -> torch.Tensor:
            with self.noisy(tunable, owners_of(batch), batch[SEEDS].tolist()):
                return loss_of(tunable, without_seeds(batch))

        return changed

    @contextmanager
    def noisy(self, tunable: TunableModel, owners: np.ndarray, seeds: Sequence[int]) -> Iterator[None]:
        """Noise on what the network's embeddings say of a batch meanwhile; none on padding. `owners` as
        `owners_of` gives them. Raises M306 where the network does not ask them."""
        module, asked = tunable.base.net.get_input_embeddings(), False

        def add(module: Any, inputs: Any, said: torch.Tensor) -> torch.Tensor:
            nonlocal asked
            if said.shape[:2] != owners.shape:  # virtual tokens
                return said
            asked = True
            total = np.zeros(said.shape, np.float32)
            for place, seed in enumerate(seeds):
                own = owners == place
                for number, change in enumerate(self.changes):
                    if change.is_noise:
                        draw = stream("input noise", seed, number)
                        total[own] += change.noise(int(own.sum()), said.shape[-1], draw)
            return said + torch.from_numpy(total).to(said)

        handle = module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if not asked:
            raise FedtuneError(
                "M306",
                f"[[method.train.inputs]] on a {type(tunable.base.net).__name__} that asks no embeddings",
                "a model whose texts go through its input embeddings",
                "remove [[method.train.inputs]]",
            )
