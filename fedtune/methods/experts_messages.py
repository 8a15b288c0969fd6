"""What clients are given in the rounds of experts, and who lives where: all of it follows from the recipe,
the model and how many experts there are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedtune.aggregate import Rule
from fedtune.experts.need import MOST
from fedtune.experts.shapes import living
from fedtune.experts.state import A_END, B_END, OWN, fresh, is_pair
from fedtune.methods.experts_settings import ExpertsSettings
from fedtune.methods.fedpeft_ranks import at_rank as shape_at
from fedtune.schema import Schema
from fedtune.types import Round, Tensors


class Messages:
    """Schemas of what goes down."""

    def __init__(self, settings: ExpertsSettings, rule: Rule) -> None:
        self.settings, self.rule, self.grouping = settings, rule, settings.experts

    def ever(self, names: Mapping[str, Any]) -> frozenset[str]:
        """What is trained in some round; the rest stays as the seed made it and never travels."""
        return self.rule.trains(names, 1) | self.rule.trains(names, 2)

    def general(self, tunable: Any) -> Schema:
        names = self.ever(tunable.named)
        return Schema.of({name: value for name, value in tunable.named.items() if name in names})

    def beside(self, tunable: Any) -> Schema:
        """The general expert, and the pairs of one expert: in a shape, the first of as many as there can
        be."""
        if self.grouping.shape == "whole" or not self.grouping.slots:
            return with_own(self.general(tunable), self.settings.lora.rank)
        return next(self.by_layers(tunable, [self.grouping.slots]))

    def others(self, tunable: Any, client: int, now: Round) -> Iterator[Schema]:
        """Other experts than that: of another rank or, in a shape, in other layers."""
        equal = self.settings.lora.rank
        if self.grouping.rank == "auto":
            general = self.general(tunable)
            yield from (with_own(general, rank) for rank in range(1, MOST * equal + 1) if rank != equal)
        if self.grouping.shape != "whole":
            yield from self.by_layers(tunable, range(1, self.grouping.slots + 1))

    def by_layers(self, tunable: Any, of: Iterable[int]) -> Iterator[Schema]:
        """An expert's, for each one of so many experts."""
        general = self.general(tunable)
        for count in of:
            where = layers_by_expert(self.living(general, count), count)
            yield from (with_own(general, self.settings.lora.rank, here) for here in where)

    def sent(self, given: Schema, now: Round) -> frozenset[str]:
        own = [name.removeprefix(OWN) for name in given.shapes if name.startswith(OWN)]
        return frozenset(OWN + name for name in self.rule.sends(own, now.number))

    def living(self, general: Schema, count: int) -> dict[str, tuple[int, ...]]:
        """Layer -> the numbers of those of `count` experts that live there."""
        layers = [name.removesuffix(B_END) for name, _ in general.entries if name.endswith(B_END)]
        return living(layers, count, self.grouping.shape, self.grouping.fewest)

    def first(
        self, general: Tensors, groups: Mapping[str, tuple[int, ...]], seed: int
    ) -> dict[str, dict[str, np.ndarray]]:
        """Every group's expert before its first round, in the layers where it lives; none in the shape
        "whole", where an expert is there once its group has trained it."""
        names = self.grouping.names(groups)
        if self.grouping.shape == "whole" or not names:
            return {}
        where = layers_by_expert(self.living(Schema.of(general), len(names)), len(names))
        whole = fresh(general, seed)
        return {
            name: {tensor: value for tensor, value in whole.items() if layer_of(tensor) in here}
            for name, here in zip(names, where, strict=True)
        }


def with_own(general: Schema, rank: int, here: Collection[str] | None = None) -> Schema:
    """The general expert, and the pairs of one expert in these layers (None: in all)."""
    own = [
        (OWN + name, shape_at(name, shape, rank))
        for name, shape in general.entries
        if is_pair(name) and (here is None or layer_of(name) in here)
    ]
    return Schema(tuple(sorted([*general.entries, *own])))


def layers_by_expert(living: Mapping[str, tuple[int, ...]], count: int) -> list[frozenset[str]]:
    return [frozenset(layer for layer, who in living.items() if n in who) for n in range(count)]


def layer_of(name: str) -> str:
    return name.removesuffix(A_END).removesuffix(B_END)
