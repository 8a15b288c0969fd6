"""Where a recipe's relative paths are meant from: said once and passed on, never the working directory of
whoever reads the run."""

from __future__ import annotations

from pathlib import Path

from fedtune.config import Recipe


def located(recipe: Recipe, place: Path | None) -> Recipe:
    """The recipe with its paths counted from `place`, to read files by. It has another fingerprint: a run's
    identity is the recipe as it was written."""
    if place is None:
        return recipe
    tables = {
        name: getattr(recipe, name).located(place) for name in ("model", "data", "deploy", "watch", "method")
    }
    return recipe.model_copy(update=tables)
