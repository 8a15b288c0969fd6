"""Aggregation: how many adapters become one. One short file a rule, numpy only; it knows no runtime, no network and no model.

RULES[name](options) -> Rule         a round's answers -> the next adapter
    MERGES[name](options) -> Merge       finished experts -> one adapter
"""

from __future__ import annotations

from collections.abc import Callable

from fedtune.aggregate.answer import Answer, Combined, Rule, TooFew
from fedtune.aggregate.clipped import clipped
from fedtune.aggregate.fair import fair
from fedtune.aggregate.fedex import fedex
from fedtune.aggregate.fedrot import fedrot
from fedtune.aggregate.fedsa import fedsa
from fedtune.aggregate.fedsb import fedsb
from fedtune.aggregate.ffa import ffa
from fedtune.aggregate.flexlora import flexlora
from fedtune.aggregate.flora import flora
from fedtune.aggregate.gather import drift
from fedtune.aggregate.hetlora import hetlora
from fedtune.aggregate.krum import krum
from fedtune.aggregate.mean import mean
from fedtune.aggregate.median import median
from fedtune.aggregate.merging import MERGES, Merge
from fedtune.aggregate.pairs import Pair, flat_residual, join, ranks, residual_of, split
from fedtune.aggregate.plain import WeightedMean
from fedtune.aggregate.residual import as_adapter
from fedtune.aggregate.resize import for_rank, left_out
from fedtune.aggregate.rolora import rolora
from fedtune.aggregate.trimmed import trimmed

RULES: dict[str, Callable[..., Rule]] = {
    "mean": mean,
    "ffa": ffa,
    "rolora": rolora,
    "fedsa": fedsa,
    "fedsb": fedsb,
    "flora": flora,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "fedex": fedex,
    "fair": fair,
    "fedrot": fedrot,
    "median": median,
    "trimmed": trimmed,
    "krum": krum,
    "clipped": clipped,
}

__all__ = [
    "MERGES",
    "RULES",
    "Answer",
    "Combined",
    "Merge",
    "Pair",
    "Rule",
    "TooFew",
    "WeightedMean",
    "as_adapter",
    "drift",
    "flat_residual",
    "for_rank",
    "join",
    "left_out",
    "ranks",
    "residual_of",
    "split",
]
