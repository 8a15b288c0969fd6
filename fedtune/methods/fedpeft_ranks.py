"""Clients of different ranks: what each trains and needs, and from "auto" to ranks.

A run's recipe always says every client's rank, so that server, clients and a resumed run read the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedtune.data import load
from fedtune.errors import FedtuneError
from fedtune.methods.base import AdapterCosts
from fedtune.methods.memory_ranks import MIB, Needs, bytes_of, powers, rank_for, reason
from fedtune.model.adapters import Lora
from fedtune.types import LM_TASKS

if TYPE_CHECKING:
    from fedtune.methods.fedpeft_settings import FedPEFTSettings
    from fedtune.model.memory_plan import Plan


@dataclass(frozen=True)
class RanksByClient:
    """The `Ranks` of FedPEFT. `seat` gives rank and scale of a client."""

    seat: Callable[[int], tuple[int, float]]

    def of(self, client: int) -> int:
        return self.seat(client)[0]

    def trained(self, plan: Plan, client: int) -> int:
        return plan_at(plan, self.of(client)).trainable


class FedPEFTCosts(AdapterCosts):
    """As for any adapter, at a client's rank and with what the rule carries beside it."""

    def __init__(self, settings: FedPEFTSettings, extra: int) -> None:
        super().__init__(settings)
        self.extra = extra

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        adapter = self.settings.adapter
        return (
            self.memory_at(plan, length, adapter.rank)
            if isinstance(adapter, Lora)
            else super().memory(plan, length)
        )

    def memory_at(self, plan: Plan, length: int, rank: int) -> Mapping[str, int]:
        """Of a client of this rank."""
        return super().memory(plan_at(plan, self.extra + rank), length)


def at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of a tensor of the same adapter at another rank."""
    if name.endswith(".lora_A.weight"):
        return (rank, *shape[1:])
    return (shape[0], rank) if name.endswith(".lora_B.weight") else shape


def plan_at(plan: Plan, rank: int) -> Plan:
    """The plan of the same adapter at another rank."""
    shapes = {name: at_rank(name, shape, rank) for name, shape in plan.shapes.items()}
    return replace(plan, shapes=shapes, trainable=sum(math.prod(shape) for shape in shapes.values()))


def decided(
    settings: FedPEFTSettings, recipe: Any, memory: Sequence[int], labels: int | None, least: bool
) -> FedPEFTSettings:
    """Ranks in the place of lora_rank_by_client = "auto".

    memory  bytes that each client has for training, by client number, as a coordinator hears it from them; ()
            takes
            method.memory_by_client, in turns
    labels  size of the label set; None reads the data for it where the task has one
    least   a client in whose memory nothing fits is given rank 1
    Raises C104 where no memory is known, M308 where not even rank 1 fits, and what the plan raises.
    """
    known = list(memory) or [bytes_of(size) for size in settings.memory_by_client]
    if not known:
        found = "method.lora_rank_by_client = 'auto' where no client's memory is known"
        raise FedtuneError(
            "C104",
            found,
            "method.memory_by_client, or clients that report it",
            "set it, for example: method.memory_by_client = ['2 GiB', '4 GiB']",
        )
    needs = needs_of(settings, recipe, label_count(recipe) if labels is None else labels)
    smallest = sum(needs(1).values()) if least else 0
    return settings.with_ranks(
        [
            rank_for(max(held, smallest), settings.lora.rank, needs, f"client {number}")
            for number, held in enumerate(known)
        ]
    )


def label_count(recipe: Any) -> int:
    if recipe.data.task in LM_TASKS:
        return 0
    return len(recipe.data.labels) or len(load(recipe.data, recipe.partition, recipe.seed).labels)


def needs_of(settings: FedPEFTSettings, recipe: Any, labels: int, plan: Plan | None = None) -> Needs:
    """A training client's memory, by rank. No weights are read."""
    costs = FedPEFTCosts(settings, recipe.aggregate.residual_rank)
    made = plan or costs.plan(recipe.model, recipe.data.task, labels)
    return lambda rank: costs.memory_at(made, recipe.data.max_length, rank)


def explained(
    settings: FedPEFTSettings, recipe: Any, names: Sequence[str], plan: Plan
) -> tuple[FedPEFTSettings, list[str]]:
    """For `fedtune check`: the settled recipe, and a line for each client's rank; none where all have the
    server's rank.

    Where "auto" waits for what clients will report, the greatest rank stands in and the lines say what each
    rank needs. Raises M308.
    """
    needs, most = needs_of(settings, recipe, 0, plan), settings.lora.rank
    if settings.lora_rank_by_client != "auto":
        ranks = settings.lora_rank_by_client
        each = [ranks[number % len(ranks)] for number in range(len(names))]
        return settings, [
            f"{name}: rank {rank} of {most}, by the recipe; needs {total(needs, rank)}"
            for name, rank in zip(names, each, strict=True)
        ]
    known = [bytes_of(size) for size in settings.memory_by_client]
    if not known:
        return settings.with_ranks([next(powers(most))]), [
            f"by the memory that a client reports: rank {rank} needs {total(needs, rank)}"
            for rank in powers(most)
        ]
    lines = []
    for number, name in enumerate(names):
        held = known[number % len(known)]
        rank = rank_for(held, most, needs, f"'{name}'")
        lines.append(f"{name}: rank {rank} of {most}, by its memory; {reason(rank, held, most, needs)}")
    return settings.with_ranks(
        [rank_for(held, most, needs, f"client {number}") for number, held in enumerate(known)]
    ), lines


def total(needs: Needs, rank: int) -> str:
    return f"{sum(needs(rank).values()) / MIB:,.1f} MiB"
