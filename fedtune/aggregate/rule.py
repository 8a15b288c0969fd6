"""What an aggregation rule is: a table of a recipe that knows how to aggregate.

A rule is one file with one class: its settings, what it needs, and its code. It is registered by its place in
`AggregateSettings`
(fedtune/aggregate/__init__.py); recipes, checks, docs and the laws in tests/aggregate/test_rule_laws.py
follow from that.

>>> class First(Rule):
...     rule: str = "first"
...     linear: ClassVar[bool] = False
...
...     def combine(self, answers, before, scale, now):
...         return Combined(dict(next(iter(checked(answers))).tensors))
>>> from fedtune.types import Round
>>> answers = [ClientAdapter(0, {"w": np.array([1.0])}), ClientAdapter(1, {"w": np.array([5.0])})]
>>> First().combine(answers, Combined({"w": np.zeros(1)}), 1.0, Round(1, 7, (0, 1))).tensors
{'w': array([1.])}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np

from fedtune.aggregate.answer import ClientAdapter, Combined, checked, misfit
from fedtune.aggregate.resize import for_rank
from fedtune.errors import FedtuneError
from fedtune.settings import Settings
from fedtune.types import Round, Tensors

__all__ = ["ClientAdapter", "Combined", "Names", "Rule", "TooFew", "checked", "misfit"]

Names = Iterable[str]


class TooFew(FedtuneError):
    """Fewer answers than the rule needs for what it promises (R410): the round changes nothing, the run goes
    on."""


class Rule(Settings):
    """[aggregate]: how the clients' answers become the next adapter. The defaults are those of a plain
    weighted mean.

    linear   a weighted mean of the answers is all that it needs (`from_mean`), so that sums may be masked;
             else it has a `combine`
    pairs    it works on pairs of LoRA factors, and so needs kind = "lora"
    mixed    clients may have ranks and scales of their own: those that hold one product, each at its own,
             give that product
    carries  it would change the base; the change travels as a residual of rank `extra` instead
    steps    a server optimiser may take a step towards its result
    weighted answers count by their weight; a robust rule ignores it, because a client could claim any
    core     a small matrix between fixed factors is trained, which a first round with all factors finds
    """

    rule: str
    linear: ClassVar[bool] = True
    pairs: ClassVar[bool] = False
    mixed: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    steps: ClassVar[bool] = False
    weighted: ClassVar[bool] = True
    core: ClassVar[bool] = False

    @property
    def residual_rank(self) -> int:
        """The greatest rank of what is carried beside the adapter; 0 where nothing is."""
        return int(getattr(self, "extra", 0)) if self.carries else 0

    def limits(self, asked: int) -> Iterator[tuple[str, str, str]]:
        """Why so few answers a round cannot work: found, expected, what to do."""
        yield from ()

    def trains(self, names: Names, number: int) -> frozenset[str]:
        """What clients train in this round."""
        return frozenset(names)

    def sends(self, names: Names, number: int) -> frozenset[str]:
        """What travels up in this round."""
        return self.trains(names, number)

    def stays(self, names: Names) -> frozenset[str]:
        """What a client keeps as its own and the server never overwrites."""
        return frozenset()

    def from_mean(self, before: Tensors, mean: Tensors) -> dict[str, np.ndarray]:
        """The mean of what was sent, in the place of what was there; float32, name order. Raises M305 or
        W607."""
        unknown = sorted(mean.keys() - before.keys())
        if unknown:
            raise FedtuneError(
                "M305", f"a mean of '{unknown[0]}'", "names of the adapter", "average what the rule sends"
            )
        for name, value in mean.items():
            if np.shape(value) != np.shape(before[name]):
                raise misfit(name, np.shape(value), np.shape(before[name]))
            if not np.isfinite(value).all():
                raise FedtuneError(
                    "W607",
                    f"NaN or Inf in the mean of '{name}'",
                    "finite numbers",
                    "leave out the client that sent them",
                )
        return {name: np.asarray(mean.get(name, before[name]), dtype=np.float32) for name in sorted(before)}

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        """Answers in ascending order of clients, the state before, the server's scale -> the next state, at
        the ranks of the state before.

        Reads one answer at a time; the arrays of an answer do not change until it returns.
        """
        raise NotImplementedError(f"the rule '{self.rule}' works on the mean alone")

    def for_rank(
        self, tensors: Tensors, scale: float, rank: int, client_scale: float
    ) -> dict[str, np.ndarray]:
        """The adapter at its scale -> the adapter that a client of this rank and scale is given."""
        return dict(tensors) if self.linear else for_rank(tensors, scale, rank, client_scale)
