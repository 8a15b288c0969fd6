"""What the tests of FedKSeed have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.schema import digest
from fedtune.types import State
from tests import small

WALK = {"type": "fedkseed", "size": 256, "estimator": "spsa", "steps": 6, "batch": 4, "lr": 1e-3}
SGD = {"optimizer": "sgd", "lr": 0.05, "steps": 2, "batch": 4}


def recipe_of(model: Path, data: Path, changes: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return small.recipe(model, data, method={**WALK, **(changes or {})}, **more)


def weights(recipe: Recipe, state: State) -> str:
    """SHA-256 of the model that a state means, rebuilt in a new world."""
    workspace, link = small.workspace_of(recipe)
    link.method.install(state, workspace.tunable)
    return digest(workspace.tunable.read())
