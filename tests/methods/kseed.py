"""What the tests of FedKSeed have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune import methods, transforms
from fedtune.config import Recipe
from fedtune.runtime.cohort import Link
from fedtune.runtime.states import Memories
from fedtune.runtime.world import World, build_world
from fedtune.schema import digest
from fedtune.types import State
from tests import small

WALK = {"type": "fedkseed", "size": 256, "estimator": "spsa", "steps": 6, "batch": 4, "lr": 1e-3}
SGD = {"optimizer": "sgd", "lr": 0.05, "steps": 2, "batch": 4}


def recipe_of(model: Path, data: Path, changes: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return small.recipe(model, data, method={**WALK, **(changes or {})}, **more)


def world_of(recipe: Recipe) -> tuple[World, Link]:
    method = methods.build(recipe.method, recipe.rounds)
    world = build_world(recipe, method, Memories(None), lambda event: None)
    return world, Link("run", world.base.fingerprint, method, transforms.build(recipe.chain))


def weights(recipe: Recipe, state: State) -> str:
    """SHA-256 of the model that a state means, rebuilt in a new world."""
    world, link = world_of(recipe)
    link.method.install(state, world.bench)
    return digest(world.bench.read())
