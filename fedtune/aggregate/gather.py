"""What the rules that read single answers have in common: one pass over the answers, then one module at a
time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedtune.aggregate.answer import ClientAdapter, Combined, checked, misfit
from fedtune.aggregate.pairs import Pair, join, split
from fedtune.aggregate.product import ProductSum, inner, ratio
from fedtune.aggregate.weighted_mean import WeightedMean
from fedtune.errors import FedtuneError
from fedtune.types import Tensors

Look = Callable[[str, Pair, ClientAdapter], None]


class Module(NamedTuple):
    """One module of a finished pass; clients' scales are inside `product`; in `mean` they are relative to the
    server's.

    product  sum_i p_i s_i B_i A_i as stacked factors (d x R, R x k)
    mean     scale times (mean B)(mean A) is what averaging factors would give, with the server's scale;
             smaller ranks padded with zeros
    share    (r,) part of the weight whose clients have this rank slice
    before   the server's pair before the round
    """

    name: str
    product: Pair
    mean: Pair
    share: np.ndarray
    before: Pair


@dataclass
class Sums:
    product: ProductSum
    b: np.ndarray
    a: np.ndarray
    share: np.ndarray


@dataclass
class Gathered:
    """Sums over the answers, not yet divided by `weight`."""

    before: dict[str, Pair]
    sums: dict[str, Sums]
    rest: WeightedMean
    weight: float = 0.0
    clients: int = 0

    def modules(self) -> Iterator[Module]:
        """One module at a time, so that only one stands in float64."""
        for name, sums in self.sums.items():
            product = (
                sums.product.stacked(1 / self.weight) if sums.product.parts else nothing(self.before[name])
            )
            yield Module(
                name,
                product,
                Pair(sums.b / self.weight, sums.a / self.weight),
                sums.share / self.weight,
                self.before[name],
            )


def gather(
    answers: Iterable[ClientAdapter],
    before: Combined,
    scale: float,
    look: Look | None = None,
    slices: bool = True,
) -> Gathered:
    """One pass; `look` sees every pair of it. Ranks may exceed the server's only without `slices`. Raises
    M305, W607, R405."""
    pairs, rest = split(before.tensors)
    made = Gathered(
        pairs,
        {
            name: Sums(ProductSum(), np.zeros(p.B.shape), np.zeros(p.A.shape), np.zeros(p.rank))
            for name, p in pairs.items()
        },
        WeightedMean(),
    )
    for answer in checked(answers):
        mine, others = split(answer.tensors)
        same_names(answer, mine, pairs)
        same_names(answer, others, rest)
        for name, value in others.items():
            if np.shape(value) != np.shape(rest[name]):
                raise misfit(name, np.shape(value), np.shape(rest[name]))
        for name, pair in mine.items():
            same_module(name, pair, pairs[name])
            add(made.sums[name], name, pair, answer, scale, slices)
            if look:
                look(name, pair, answer)
        made.rest.add(others, answer.weight)
        made.weight += answer.weight
        made.clients += 1
    return made


def add(sums: Sums, name: str, pair: Pair, answer: ClientAdapter, scale: float, slices: bool) -> None:
    sums.product.add(pair, answer.weight * answer.scale)
    rank = min(pair.rank, sums.share.size)
    if slices and rank < pair.rank:
        raise misfit(name, pair.A.shape, sums.a.shape)
    sums.b[:, :rank] += np.multiply(pair.B[:, :rank], answer.weight * answer.scale / scale, dtype=np.float64)
    sums.a[:rank] += np.multiply(pair.A[:rank], answer.weight, dtype=np.float64)
    sums.share[:rank] += answer.weight


@dataclass
class Ledger:
    """Errors of a result against mean(BA), module by module, as squares, so that they add up over modules."""

    scale: float
    whole: float = 0.0
    errors: float = 0.0
    drifts: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)

    def note(
        self, module: Module, error: float | None = None, made: Pair | None = None, whole: float | None = None
    ) -> None:
        """Either the error's norm is known (from singular values), or the pair that was made, to be compared
        with mean(BA)."""
        square = inner(module.product, module.product) if whole is None else whole**2
        if error is None:
            error = 0.0 if made is None else away(module.product, square, made, self.scale)
        self.whole += square
        self.errors += error**2
        self.drifts += away(module.product, square, module.mean, self.scale) ** 2
        self.layers[module.name] = ratio(error, math.sqrt(max(0.0, square)))

    def report(self) -> dict[str, float]:
        return {
            "error": ratio(math.sqrt(self.errors), math.sqrt(self.whole)),
            "drift": ratio(math.sqrt(self.drifts), math.sqrt(self.whole)),
        }


def away(product: Pair, square: float, made: Pair, scale: float) -> float:
    """||B A - scale B' A'||_F, with ||B A||^2 known: O((d + k) R r)."""
    return math.sqrt(max(0.0, square - 2 * scale * inner(product, made) + scale**2 * inner(made, made)))


def finished(
    made: Gathered,
    pairs: dict[str, Pair],
    ledger: Ledger,
    residual: dict[str, Pair] | None = None,
    more: dict[str, float] | None = None,
) -> Combined:
    return Combined(
        join(pairs, made.rest.mean()), residual or {}, ledger.report() | (more or {}), ledger.layers
    )


def alive(module: Module) -> Pair:
    """The mean of factors; a slice that nobody had keeps its A beside B = 0, or no gradient would ever reach
    it again."""
    return Pair(module.mean.B, np.where((module.share > 0)[:, None], module.mean.A, module.before.A))


def nothing(like: Pair) -> Pair:
    """A product that is zero."""
    return Pair(np.zeros((like.B.shape[0], 1)), np.zeros((1, like.A.shape[1])))


def same_names(
    answer: ClientAdapter, found: Tensors | dict[str, Pair], expected: Tensors | dict[str, Pair]
) -> None:
    odd = sorted(found.keys() ^ expected.keys())
    if odd:
        where = "only there" if odd[0] in found else "not there"
        raise FedtuneError(
            "M305",
            f"'{odd[0]}' {where} in the answer of client {answer.client}",
            "the names of the server's adapter",
            "leave this client out",
        )


def same_module(name: str, pair: Pair, expected: Pair) -> None:
    found = (pair.B.shape[0], pair.A.shape[1])
    wanted = (expected.B.shape[0], expected.A.shape[1])
    if found != wanted:
        raise FedtuneError(
            "M305", f"a pair for a weight of {found} in '{name}'", f"{wanted}", "leave this client out"
        )
