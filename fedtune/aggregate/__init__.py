"""Aggregation: how many adapters become one. One short file a rule, numpy only; it knows no runtime, no
network and no model.

A rule is registered by its place in `AggregateSettings`; RULES[name] is its class.

    RULES[name](options) -> Rule         a round's answers -> the next adapter
    MERGES[name](options) -> Merge       finished experts -> one adapter
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.aggregate.clipped import Clipped
from fedtune.aggregate.fair import Fair
from fedtune.aggregate.fedex import FedEx
from fedtune.aggregate.fedrot import FedRot
from fedtune.aggregate.fedsa import FedSA
from fedtune.aggregate.fedsb import FedSB
from fedtune.aggregate.ffa import FFA
from fedtune.aggregate.flexlora import FlexLoRA
from fedtune.aggregate.flora import FLoRA
from fedtune.aggregate.hetlora import HetLoRA
from fedtune.aggregate.hft import HFT
from fedtune.aggregate.krum import Krum
from fedtune.aggregate.mean import Mean
from fedtune.aggregate.median import Median
from fedtune.aggregate.merging import MERGES, Merge
from fedtune.aggregate.pairs import Pair, flat_residual, join, ranks, residual_of, split
from fedtune.aggregate.residual import as_adapter
from fedtune.aggregate.resize import for_rank, left_out
from fedtune.aggregate.rolora import RoLoRA
from fedtune.aggregate.rule import ClientAdapter, Combined, Rule, TooFew
from fedtune.aggregate.trimmed import Trimmed
from fedtune.aggregate.weighted_mean import WeightedMean
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

AggregateSettings = Annotated[
    Mean
    | FFA
    | RoLoRA
    | FedSA
    | HFT
    | FedSB
    | FLoRA
    | FlexLoRA
    | HetLoRA
    | FedEx
    | Fair
    | FedRot
    | Median
    | Trimmed
    | Krum
    | Clipped,
    Field(discriminator="rule"),
]
if not TYPE_CHECKING:
    AggregateSettings = extended(AggregateSettings, "rule", "rules", Rule)
RULES: dict[str, type[Rule]] = classes_by_tag(AggregateSettings, "rule")

__all__ = [
    "MERGES",
    "RULES",
    "AggregateSettings",
    "ClientAdapter",
    "Combined",
    "Mean",
    "Merge",
    "Pair",
    "Rule",
    "TooFew",
    "WeightedMean",
    "as_adapter",
    "flat_residual",
    "for_rank",
    "join",
    "left_out",
    "ranks",
    "residual_of",
    "split",
]
