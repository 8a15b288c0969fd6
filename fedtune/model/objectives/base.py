"""What every objective is: a table of settings that turns logits and labels into a loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedtune.settings import Settings

if TYPE_CHECKING:
    import torch

    from fedtune.model.encode import Encoded

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Context:
    """What a client knows of its own rows. None of it leaves the client.

    counts  rows of each class, in the order of the labels; () for language models
    """

    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, encoded: Encoded, classes: int) -> Context:
        """Of the client's training rows; `classes` is 0 for language models."""
        if not classes:
            return cls()
        found = Counter(int(encoded[row]["labels"]) for row in range(len(encoded)))
        return cls(tuple(found[label] for label in range(classes)))


@dataclass(frozen=True)
class Predictions:
    """What a model says of a batch, and what was wanted.

    logits, reference  (B, C) or, of language models, (B, T, C), in float32; the reference has no gradient
    labels             (B,) or (B, T); -100 carries no loss

    Of pairs of responses (B, 2, T, C) and (B, 2, T).
    """

    logits: torch.Tensor
    labels: torch.Tensor
    context: Context
    reference: torch.Tensor | None = None


class Objective(Settings):
    """[method.train.objective]: the union of these classes is the registry (__init__.py).

    tasks      of a recipe that it can be trained by
    by_values  its gradient is that of its value: walkers, who compare values, can train by it too
    """

    loss: str
    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "image-classify", "causal-lm", "instruct"})
    by_values: ClassVar[bool] = True

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if recipe.data.task not in self.tasks:
            pairs = recipe.data.task == "preference"
            yield (
                f"method.train.objective.loss = '{self.loss}' with data.task = '{recipe.data.task}'",
                "a loss on pairs" if pairs else f"one of {', '.join(sorted(self.tasks))}",
                "set it to dpo, ipo, orpo or simpo" if pairs else "remove [method.train.objective]",
            )

    @property
    def plain(self) -> bool:
        """Whether this is the cross entropy and nothing else, which has a way of its own (in pieces)."""
        return False

    @property
    def refers(self) -> bool:
        """Whether it compares with what the model says without its adapter."""
        return False

    def summed(self, said: Predictions) -> torch.Tensor:
        """The loss summed over what carries it, as a scalar."""
        raise NotImplementedError(f"'{self.loss}' has no formula")
