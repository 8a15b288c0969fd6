"""FedRot-LoRA: every client's factors are turned towards the server's, then averaged (arXiv:2602.23638). Up:
both factors.

(B Q)(Q^T A) is the same product for any orthogonal Q, so clients that learned the same in turned bases cancel
in a mean of factors.
Q is the orthogonal Procrustes solution (Schoenemann 1966): the polar factor of B^T B_0 / ||B_0||^2 + A A_0^T
/ ||A_0||^2, both factors
counted alike (our choice). What does not come from turning stays wrong, and `error` says how much.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np

from fedtune.aggregate.gather import Ledger, finished, gather
from fedtune.aggregate.pairs import Pair, split
from fedtune.aggregate.residual import widened
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.types import Round


class FedRot(Rule):
    """rule = "fedrot": every client's factors are turned towards the server's, then averaged."""

    rule: Literal["fedrot"] = "fedrot"
    linear: ClassVar[bool] = False
    pairs: ClassVar[bool] = True

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        reference = split(before.tensors)[0]
        sums = {name: (np.zeros(pair.B.shape), np.zeros(pair.A.shape)) for name, pair in reference.items()}

        def turn(name: str, pair: Pair, answer: ClientAdapter) -> None:
            near = turned(pair, reference[name])
            sums[name][0][:] += near.B * (answer.weight * answer.scale / scale)
            sums[name][1][:] += near.A * answer.weight

        made = gather(answers, before, scale, look=turn)
        ledger, pairs = Ledger(scale), dict[str, Pair]()
        for module in made.modules():
            b, a = sums[module.name]
            pairs[module.name] = Pair(b / made.weight, a / made.weight)
            ledger.note(module, made=pairs[module.name])
        return finished(made, pairs, ledger)


def turned(pair: Pair, reference: Pair) -> Pair:
    """The same product in the basis nearest to the reference; smaller ranks are padded with zeros first."""
    wide = widened(pair, reference.rank)
    b, a = np.asarray(wide.B, dtype=np.float64), np.asarray(wide.A, dtype=np.float64)
    towards = pull(b.T @ reference.B, reference.B) + pull(a @ reference.A.T, reference.A)
    if not towards.any():
        return Pair(b, a)
    u, _, vt = np.linalg.svd(towards)
    q = u @ vt
    return Pair(b @ q, q.T @ a)


def pull(product: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """A factor's part; a factor that starts at zero has none."""
    square = float(np.sum(np.square(reference, dtype=np.float64)))
    return product / square if square else np.zeros_like(product)
