"""LoRA-FAIR: mean factors, and a correction of B that brings the product near the mean of products (Bian et
al. 2025, arXiv:2411.14961).

Up: both factors. dB = argmin ||dW - s (mean B + dB)(mean A)||_F^2 + lam t ||dB||_F^2, with dW = mean of
products: ridge regression, in
closed form. The paper maximises a cosine similarity by gradient steps, which leaves the length of the product
open; the norm fixes
it and has one solution. t, the mean eigenvalue of s^2 A A^T, makes `lam` free of the scale of A (our choice).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.aggregate.gather import Ledger, Module, finished, gather
from fedtune.aggregate.pairs import Pair
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule
from fedtune.types import Round


class Fair(Rule):
    """rule = "fair": mean factors, and a correction of B towards the mean of products."""

    rule: Literal["fair"] = "fair"
    linear: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    lam: float = Field(0.01, gt=0)
    """Lambda, the weight of a small correction; 0.01 is the paper's."""

    def combine(
        self, answers: Iterable[ClientAdapter], before: Combined, scale: float, now: Round
    ) -> Combined:
        made = gather(answers, before, scale)
        ledger, pairs = Ledger(scale), dict[str, Pair]()
        for module in made.modules():
            pairs[module.name] = corrected(module, scale, self.lam)
            ledger.note(module, made=pairs[module.name])
        return finished(made, pairs, ledger)


def corrected(module: Module, scale: float, lam: float) -> Pair:
    """dB = E M^T (M M^T + lam t I)^-1 with M = s mean A and E = dW - mean B M, from r-sized matrices only."""
    b, a = module.mean
    m = scale * a
    gram = m @ m.T  # (r, r)
    size = np.trace(gram) / len(gram)
    if not size:
        return module.mean
    missed = module.product.B @ (module.product.A @ m.T) - b @ gram  # E M^T, (d, r)
    return Pair(b + np.linalg.solve(gram + lam * size * np.eye(len(gram)), missed.T).T, a)
