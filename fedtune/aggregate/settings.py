"""[aggregate]: how the server makes one adapter out of many."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtune.settings import Settings

AggregateRule = Literal[
    "mean", "ffa", "rolora", "fedsa", "fedsb", "flora", "flexlora", "hetlora", "fedex", "fair", "fedrot", "median", "trimmed", "krum", "clipped"
]
SUMS = frozenset({"mean", "ffa", "rolora", "fedsa", "fedsb"})  # a weighted sum of the answers is all that they need
LORA = frozenset({"ffa", "rolora", "fedsa", "fedsb", "flora", "flexlora", "hetlora", "fedex", "fair", "fedrot"})  # they work on pairs of factors
MIXED = frozenset({"flora", "flexlora", "hetlora", "fedex", "median", "trimmed", "krum", "clipped"})
"""Clients may have ranks and scales of their own: those that hold one product, each at its own, give that product (tests/aggregate/test_mixed.py).
Not fair and fedrot: they average zero-padded factors, and what they mend of that is not all of it."""
CARRIES = frozenset({"flora", "fedex"})  # they would change the base; the change travels as extra rank instead


class AggregateSettings(Settings):
    """[aggregate]: the rule by which the server makes one adapter out of the clients' answers."""

    rule: AggregateRule = "mean"
    """mean (FedIT), ffa, rolora, fedsa, fedsb, flora, flexlora, hetlora, fedex, fair, fedrot; against faulty clients median, trimmed, krum, clipped."""
    extra: int = Field(32, ge=1)
    """flora, fedex: rank that carries what the base model would be changed by; what does not fit is cut, and the loss is logged."""
    by: Literal["slices", "padding"] = "slices"
    """hetlora: a slice of rank is averaged over the clients that have it, or over all with zeros for the others (which dilutes high ranks)."""
    lam: float = Field(0.01, gt=0)
    """fair: lambda, the weight of a small correction."""
    trim: float = Field(0.2, gt=0, lt=0.5)
    """trimmed: share of the answers that is left out at either end; of fewer than 1/trim answers none is, and it is a mean."""
    faulty: int = Field(1, ge=0)
    """krum: number of answers that may be wrong. It needs 2 faulty + 3 answers; a round in which fewer come changes nothing (R410), the run goes on."""
    chosen: int = Field(0, ge=0)
    """krum: number of answers that are averaged (Multi-Krum); 0 means all but the faulty ones."""
    bound: float = Field(0.0, ge=0)
    """clipped: largest norm of an answer's move; 0 means the median of the round's norms."""
