"""For the robust rules: all answers of a round side by side, which they compare. Memory grows with the sum of
ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from fedtune.aggregate.answer import ClientAdapter, Combined, checked, misfit
from fedtune.aggregate.elementwise import factored, plain_entries, product_entries
from fedtune.aggregate.gather import Ledger, gather, same_module, same_names
from fedtune.aggregate.pairs import Pair, join, split
from fedtune.aggregate.product import inner
from fedtune.types import Tensors


@dataclass(frozen=True)
class HeldAdapter:
    """One answer, taken apart."""

    answer: ClientAdapter
    pairs: dict[str, Pair]
    rest: dict[str, np.ndarray]

    def pair(self, name: str) -> Pair:
        """float64, with the client's scale inside B; made anew each time, so that one module stands in
        float64."""
        return scaled(self.pairs[name], self.answer.scale)


def hold(answers: Iterable[ClientAdapter], before: Combined) -> list[HeldAdapter]:
    """All answers, checked against the server's adapter. Raises M305, W607, R405."""
    pairs, rest = split(before.tensors)
    held = []
    for answer in checked(answers):
        mine, others = split(answer.tensors)
        same_names(answer, mine, pairs)
        same_names(answer, others, rest)
        for name, pair in mine.items():
            same_module(name, pair, pairs[name])
        for name, value in others.items():
            if np.shape(value) != np.shape(rest[name]):
                raise misfit(name, np.shape(value), np.shape(rest[name]))
        held.append(HeldAdapter(answer, mine, others))
    return held


def scaled(pair: Pair, scale: float) -> Pair:
    return Pair(np.multiply(pair.B, scale, dtype=np.float64), np.asarray(pair.A, dtype=np.float64))


def entry_by_entry(
    answers: Iterable[ClientAdapter],
    before: Combined,
    scale: float,
    across: Callable[[np.ndarray], np.ndarray],
) -> Combined:
    """Entries of products and of plain tensors, each over all clients by `across`; then the best pairs of the
    server's ranks.

    report["cut/<module>"] is what refactoring lost, relative to the product, "cut" the greatest of them;
    `error` is against mean(BA),
    which a robust rule means to leave.
    """
    held = hold(answers, before)
    made = gather((h.answer for h in held), before, scale, slices=False)
    ledger, pairs, cuts = Ledger(scale), dict[str, Pair](), dict[str, float]()
    for module in made.modules():
        matrix = product_entries([h.pair(module.name) for h in held], across)
        pairs[module.name], cuts[f"cut/{module.name}"] = factored(
            matrix, module.before.rank, scale, module.name, module.before.A
        )
        ledger.note(module, made=pairs[module.name])
    rest = {name: plain_entries([h.rest[name] for h in held], across) for name in held[0].rest}
    return Combined(
        join(pairs, rest),
        report=ledger.report() | {"cut": max(cuts.values(), default=0.0)} | cuts,
        layers=ledger.layers,
    )


def squares(held: list[HeldAdapter], start: Tensors) -> np.ndarray:
    """Squared distances between answers (n x n): between products through Gram matrices of the stacked
    factors, between the rest plainly.

    The rest is taken from the state before, because far from zero differences would drown; from an answer,
    one liar could drown them all.
    """
    n = len(held)
    inner = np.zeros((n, n))
    for name in held[0].pairs:
        pairs = [h.pair(name) for h in held]
        b, a = (
            np.concatenate([pair.B for pair in pairs], axis=1),
            np.concatenate([pair.A for pair in pairs], axis=0),
        )
        starts = np.cumsum([0] + [pair.rank for pair in pairs[:-1]])
        inner += np.add.reduceat(np.add.reduceat((b.T @ b) * (a @ a.T), starts, axis=0), starts, axis=1)
    for name in held[0].rest:
        flat = np.stack(
            [(np.asarray(h.rest[name], dtype=np.float64) - start[name]).reshape(-1) for h in held]
        )
        inner += flat @ flat.T
    own = np.diag(inner)
    apart: np.ndarray = np.maximum(own[:, None] + own[None, :] - 2 * inner, 0.0)
    return apart


def move(held: HeldAdapter, origin: dict[str, Pair], start: Tensors, scale: float) -> float:
    """How far an answer is from the state before: the norm over products and plain tensors together."""
    total = 0.0
    for name in held.pairs:
        pair, before = held.pair(name), scaled(origin[name], scale)
        both = Pair(np.concatenate([pair.B, -before.B], axis=1), np.concatenate([pair.A, before.A], axis=0))
        total += inner(both, both)
    for name, value in held.rest.items():
        total += float(np.sum(np.square(np.asarray(value, dtype=np.float64) - start[name])))
    return float(np.sqrt(max(0.0, total)))
