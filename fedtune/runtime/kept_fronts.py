"""Memory of what frozen blocks say of training rows (method.adapter.keep_front), before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.config import Recipe
from fedtune.data import Federation
from fedtune.runtime.workspace import how_to_encode

if TYPE_CHECKING:
    from fedtune.model.base import Base


def kept_fronts(recipe: Recipe, base: Base, federation: Federation, tried: int) -> list[int]:
    """Bytes that each client holds from its first step on: 4 x width for each token of its rows. Of a client
    with many rows, `tried` are cut into tokens, and stand for all."""
    from fedtune.hf.config import width_of
    from fedtune.model.memory_plan import encoded_by

    width, found = width_of(base.net.config), []
    for client in federation.clients:
        some = encoded_by(recipe.model, base, client.train[:tried], **how_to_encode(recipe.data))
        tokens = sum(map(some.length, range(len(some))))
        found.append(4 * width * tokens * len(client.train) // max(1, min(tried, len(client.train))))
    return found


def fronts_in_one_place(fronts: Sequence[int]) -> list[str]:
    """What these come to in a simulation, whose process holds those of all clients that it has asked."""
    if not any(fronts) or len(fronts) < 2:
        return []
    return [
        f"front     fedtune simulate holds {sum(fronts) / 2**20:,.1f} MiB of outputs of frozen blocks once "
        "it has asked everybody; method.adapter.keep_front = false does without"
    ]
