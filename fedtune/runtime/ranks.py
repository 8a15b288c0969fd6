"""From "auto" to ranks: a run's recipe always says every client's rank, so that server, clients and a resumed run read the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.config import Recipe, method_of
from fedtune.data import load
from fedtune.errors import FedtuneError
from fedtune.methods.fedpeft import FedPEFT, FedPEFTSettings
from fedtune.methods.ranks import MIB, Needs, bytes_of, powers, rank_for, reason

if TYPE_CHECKING:
    from fedtune.model.shapes import Plan

LM = ("causal-lm", "instruct")


def is_auto(recipe: Recipe) -> bool:
    return isinstance(recipe.method, FedPEFTSettings) and recipe.method.lora_rank_by_client == "auto"


def settled(recipe: Recipe, memory: Sequence[int] = (), labels: int | None = None) -> Recipe:
    """The recipe with ranks in the place of lora_rank_by_client = "auto"; any other recipe is returned as it is.

    memory  bytes that each client has for training, by client number, as a coordinator hears it from them; () takes
            method.memory_by_client, in turns. What comes out is the recipe that somebody could have written by hand: the same bytes.
    labels  size of the label set; None reads the data for it where the task has one
    Raises C104 where no memory is known, M308 where not even rank 1 fits, and what the plan raises.
    """
    if not is_auto(recipe):
        return recipe
    method = recipe.method
    assert isinstance(method, FedPEFTSettings)
    known = list(memory) or [bytes_of(size) for size in method.memory_by_client]
    if not known:
        found = "method.lora_rank_by_client = 'auto' where no client's memory is known"
        raise FedtuneError("C104", found, "method.memory_by_client, or clients that report it", "say, for example, memory_by_client = ['2 GiB', '4 GiB']")
    needs = needs_of(recipe, label_count(recipe) if labels is None else labels)
    return with_ranks(recipe, [rank_for(held, method.adapter.rank, needs, f"client {number}") for number, held in enumerate(known)])


def with_ranks(recipe: Recipe, ranks: Sequence[int]) -> Recipe:
    """These ranks by client number, and no memory beside them."""
    method = recipe.method.model_copy(update={"lora_rank_by_client": tuple(ranks), "memory_by_client": ()})
    return recipe.model_copy(update={"method": method})


def label_count(recipe: Recipe) -> int:
    if recipe.data.task in LM:
        return 0
    return len(recipe.data.labels) or len(load(recipe.data, recipe.partition, recipe.seed).labels)


def needs_of(recipe: Recipe, labels: int, plan: Plan | None = None) -> Needs:
    """The method's own estimate of a training client's memory, by rank. No weights are read."""
    method = method_of(with_ranks(recipe, ()))
    assert isinstance(method, FedPEFT)
    made = plan or method.plan(recipe.model, recipe.data.task, labels)
    return lambda rank: method.memory(made, recipe.data.max_length, rank)


def explained(recipe: Recipe, names: Sequence[str], plan: Plan) -> tuple[Recipe, list[str]]:
    """For `fedtune check`: the settled recipe, and a line for each client's rank; none where all have the server's rank.

    Where "auto" waits for what clients will report, the greatest rank stands in and the lines say what each rank needs. Raises M308.
    """
    method = recipe.method
    if not isinstance(method, FedPEFTSettings) or not method.lora_rank_by_client:
        return recipe, []
    needs, most = needs_of(recipe, 0, plan), method.adapter.rank
    if method.lora_rank_by_client != "auto":
        ranks = method.lora_rank_by_client
        each = [ranks[number % len(ranks)] for number in range(len(names))]
        return recipe, [f"{name}: rank {rank} of {most}, by the recipe; needs {total(needs, rank)}" for name, rank in zip(names, each, strict=True)]
    known = [bytes_of(size) for size in method.memory_by_client]
    if not known:
        return with_ranks(recipe, [next(powers(most))]), [
            f"by the memory that a client reports: rank {rank} needs {total(needs, rank)}" for rank in powers(most)
        ]
    lines = []
    for number, name in enumerate(names):
        held = known[number % len(known)]
        rank = rank_for(held, most, needs, f"'{name}'")
        lines.append(f"{name}: rank {rank} of {most}, by its memory; {reason(rank, held, most, needs)}")
    return with_ranks(recipe, [rank_for(held, most, needs, f"client {number}") for number, held in enumerate(known)]), lines


def total(needs: Needs, rank: int) -> str:
    return f"{sum(needs(rank).values()) / MIB:,.1f} MiB"
