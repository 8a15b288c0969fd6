"""What every selection is: a table of settings that turns a client's training rows into those that it trains
on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedtune.settings import Settings

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Holder:
    """Whose rows they are, and what a selection may ask.

    seed     the run's
    base     TunableModel: the base as it was before any tuning; None where no selection asks it
    how      settings of [data] by which rows become tokens, and `alive`, called while that goes on
    """

    id: int
    seed: int
    base: Any
    how: Mapping[str, Any]


class Selection(Settings):
    """[[select]]: the union of these classes is the registry (__init__.py). What it chooses depends on the
    client's rows, the base model and the run's seed alone, so that every engine and a resumed run choose
    alike; it stays at the client.

    tasks   of a recipe that it can be used for
    reads   whether it asks the base model
    """

    by: str
    tasks: ClassVar[frozenset[str]] = frozenset({"instruct"})
    reads: ClassVar[bool] = False

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if recipe.data.task not in self.tasks:
            yield (
                f"[[select]] by = '{self.by}' with data.task = '{recipe.data.task}'",
                f"one of {', '.join(sorted(self.tasks))}",
                "remove it from [[select]]",
            )
        if recipe.method.spends:
            yield (
                f"[[select]] by = '{self.by}' with method.train.private",
                "rows of which none decides about another",
                "remove [[select]]",
            )

    @property
    def idle(self) -> bool:
        """Whether it leaves the rows as they are."""
        return False

    @property
    def orders(self) -> bool:
        """Whether the order in which it leaves the rows means something."""
        return False

    @property
    def longer(self) -> int:
        """Tokens by which a row may become longer."""
        return 0

    def choose(self, rows: Sequence[Row], holder: Holder) -> tuple[list[dict[str, Any]], str]:
        """The rows to train on, and what was done, in words for the client's own log. Raises ClientFailed
        D209 where nothing is left."""
        raise NotImplementedError(f"'{self.by}' chooses nothing")
