"""Whether there is room: at a site for what it is asked, before anything is loaded or computed; at the
coordinator for a run to go on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedtune.config import Recipe, method_of
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.sinks.console import size
from fedtune.trust import Ticket

SPARE = 64 << 20  # bytes of the disk that stay free
LEAST = 1 << 20  # bytes that a run needs to say anything at all, if only why it ended


def require_disk(home: Path, about: Ticket) -> None:
    """The state that is fetched and the update that is spooled. Raises R404, which is tried again later."""
    needed, free = about.given_size + about.budget + SPARE, shutil.disk_usage(home).free
    if free < needed:
        raise FedtuneError(
            "R404",
            sentence=f"the disk of '{home}' has {size(free)} free, "
            f"and a state and an update take {size(needed)}",
            do="free space; it is tried again",
        )


def require_room(run: Path) -> None:
    """A run whose process has ended without a word may have had no room for one. Raises R404."""
    if (free := shutil.disk_usage(run).free) < LEAST:
        raise FedtuneError(
            "R404",
            sentence=f"there is no space left for run '{run}' ({size(free)} free, {size(LEAST)} needed)",
            do=f"free space, then: fedtune resume {run}",
        )


def require_memory(recipe: Recipe, labels: int, device: str) -> None:
    """What stays in memory for certain: weights, trained tensors, gradients, the optimiser. Raises
    ClientFailed M310."""
    from fedtune.model.hardware import means
    from fedtune.model.memory_plan import not_tried

    costs = method_of(recipe).capabilities.costs
    parts: Mapping[str, int] = {}
    if costs:
        plan = replace(costs.plan(recipe.model, recipe.data.task, labels), peak=not_tried)
        parts = costs.memory(plan, recipe.data.max_length)
    needed, free = (
        sum(count for what, count in parts.items() if "estimate" not in what),
        int(means(device)["memory"]),
    )
    if free < needed:
        do = (
            "end other programs, use a larger device, or let the recipe hold less (method.adapter, sfprompt, "
            "fedkseed)"
        )
        raise ClientFailed(
            "M310",
            sentence=f"{device or 'this device'} has {size(free)} of free memory, and '{recipe.method.type}' "
            f"needs at least {size(needed)}",
            do=do,
        )
