"""What clients are given in the rounds of experts, and who lives where: all of it follows from the recipe,
the model and how many experts there are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from fedtune.aggregate import Rule
from fedtune.experts.need import MOST
from fedtune.experts.shapes import Where
from fedtune.experts.state import OWN, fresh, is_pair, layer_of, sizes_of
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
        """The general expert, and the pairs of one expert: the first of as many as there can be."""
        general, slots = self.general(tunable), max(self.grouping.slots, 1)
        return with_own(general, self.settings.lora.rank, self.where(general, slots).of(0))

    def others(self, tunable: Any, client: int, now: Round) -> Iterator[Schema]:
        """Other experts than that: of another rank or, in a shape, in other layers."""
        general, equal = self.general(tunable), self.settings.lora.rank
        if self.grouping.rank == "auto":
            here = self.where(general, 1).of(0)
            yield from (with_own(general, rank, here) for rank in range(1, MOST * equal + 1) if rank != equal)
        if self.grouping.shape != "whole":
            for count in range(1, self.grouping.slots + 1):
                where = self.where(general, count)
                yield from (with_own(general, equal, where.of(expert)) for expert in range(count))

    def sent(self, given: Schema, now: Round) -> frozenset[str]:
        own = [name.removeprefix(OWN) for name in given.shapes if name.startswith(OWN)]
        return frozenset(OWN + name for name in self.rule.sends(own, now.number))

    def where(self, general: Schema, count: int) -> Where:
        """Who lives where, of so many experts."""
        return self.grouping.where(sizes_of(general.shapes), count)

    def first(
        self, general: Tensors, asked: Collection[str], groups: Mapping[str, tuple[int, ...]], seed: int
    ) -> dict[str, dict[str, np.ndarray]]:
        """Experts before their first round, in the layers where they live: of the groups that are asked or,
        in a shape, of all groups, so that numbers stay as they are."""
        shaped = self.grouping.shape != "whole"
        names = self.grouping.names(groups) if shaped else sorted(asked)
        if not names:
            return {}
        where, whole = self.where(Schema.of(general), len(names)), fresh(general, seed)
        lives = {name: where.of(number) for number, name in enumerate(names)}
        return {
            name: {tensor: value for tensor, value in whole.items() if layer_of(tensor) in here}
            for name, here in lives.items()
        }


def with_own(general: Schema, rank: int, here: Collection[str]) -> Schema:
    """The general expert, and the pairs of one expert in these layers."""
    own = [
        (OWN + name, shape_at(name, shape, rank))
        for name, shape in general.entries
        if is_pair(name) and layer_of(name) in here
    ]
    return Schema(tuple(sorted([*general.entries, *own])))
