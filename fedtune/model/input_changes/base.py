"""What every change of the input side is: a table of settings that alters what a model reads while a client
trains it. What it should say stays as it was, and scores read what is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fedtune.settings import Settings
from fedtune.types import TOKEN_TASKS


@dataclass(frozen=True)
class Vocabulary:
    """What a change may put in the place of a token."""

    tokenizer: Any

    @cached_property
    def plain(self) -> np.ndarray:
        """Ids of all tokens that are not special, rising: (tokens,)."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return np.asarray(sorted(set(self.tokenizer.get_vocab().values()) - special), np.int64)

    def id_of(self, token: str) -> int | None:
        """None for what is no single token."""
        found = self.tokenizer.get_vocab().get(token)
        return None if found is None else int(found)


class InputChange(Settings):
    """[[method.train.inputs]]: the union of these classes is the registry (__init__.py).

    tasks     of a recipe that it can be used for
    is_noise  whether it adds to embeddings
    """

    input: str
    is_noise: ClassVar[bool] = False
    tasks: ClassVar[frozenset[str]] = frozenset({*TOKEN_TASKS, "classify"})

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if recipe.data.task not in self.tasks:
            yield (
                f"method.train.inputs input = '{self.input}' with data.task = '{recipe.data.task}'",
                f"one of {', '.join(sorted(self.tasks))}",
                "remove it from [[method.train.inputs]]",
            )

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, so that training is what it is without it, to the bit."""
        return False

    @property
    def ramps(self) -> bool:
        """Whether it looks at how much of the run is done."""
        return False

    def require(self, vocabulary: Vocabulary, name: str) -> None:
        """Raises C104 where the model of this name has no token that it needs."""

    def tokens(
        self,
        ids: np.ndarray,
        answered: np.ndarray,
        share: float,
        draw: np.random.Generator,
        vocabulary: Vocabulary,
    ) -> np.ndarray:
        """The tokens of one example (T,) as the model is to read them.

        answered  (T,) which of them are targets, too; no prompt and no padding
        share     how much of the run is done, from 0 to 1
        """
        return ids

    def noise(self, tokens: int, width: int, draw: np.random.Generator) -> np.ndarray:
        """What is added to the embeddings of one example: (tokens, width) float32."""
        raise NotImplementedError(f"'{self.input}' adds no noise")
