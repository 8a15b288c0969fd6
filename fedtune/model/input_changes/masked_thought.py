"""Masked Thought: some of a response's own tokens are hidden while the model learns to say them."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import FedtuneError
from fedtune.model.input_changes.base import InputChange, Vocabulary
from fedtune.types import TOKEN_TASKS

RAMP = 2 / 3  # of the run, over which the probability rises, as in the authors' code


class MaskedThought(InputChange):
    """input = "masked-thought": each token of the response, as the model reads it, is replaced with a
    probability that rises from 0 over the first two thirds of the run; labels stay (Chen et al. 2024,
    arXiv:2403.02178)."""

    input: Literal["masked-thought"] = "masked-thought"
    tasks: ClassVar[frozenset[str]] = frozenset(TOKEN_TASKS)
    probability: float = Field(0.4, ge=0, lt=1)
    """Of each token, at the end of the rise; 0 is none."""
    token: str = "mask"
    """What is read instead. mask: the tokenizer's mask token; random: for each a token of the vocabulary that
    is not special; else a token itself, such as "<unk>"."""

    @property
    def idle(self) -> bool:
        return not self.probability

    @property
    def ramps(self) -> bool:
        return not self.idle

    def require(self, vocabulary: Vocabulary, name: str) -> None:
        if self.token != "random" and self.stand_in(vocabulary) is None:
            what = "no mask token" if self.token == "mask" else f"no token '{self.token}'"
            raise FedtuneError(
                "C104",
                f"method.train.inputs token = '{self.token}' with {name}, whose tokenizer has {what}",
                "a token of the vocabulary, or random",
                "set token = 'random', or name a token in [[method.train.inputs]]",
            )

    def stand_in(self, vocabulary: Vocabulary) -> int | None:
        if self.token == "mask":
            found = vocabulary.tokenizer.mask_token_id
            return None if found is None else int(found)
        return vocabulary.id_of(self.token)

    def tokens(
        self,
        ids: np.ndarray,
        answered: np.ndarray,
        share: float,
        draw: np.random.Generator,
        vocabulary: Vocabulary,
    ) -> np.ndarray:
        hidden = answered & (draw.random(len(ids)) < self.probability * min(1.0, share / RAMP))
        instead = (
            draw.choice(vocabulary.plain, len(ids))
            if self.token == "random"
            else np.full(len(ids), self.stand_in(vocabulary))
        )
        return np.where(hidden, instead, ids)
