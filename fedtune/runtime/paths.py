"""Where a recipe's relative paths are meant from: said once and passed on, never the working directory of whoever reads the run."""

from __future__ import annotations

from pathlib import Path

from fedtune.config import Recipe
from fedtune.methods import FedPEFTSettings


def located(recipe: Recipe, place: Path | None) -> Recipe:
    """The recipe with its paths counted from `place`, to read files by. It has another fingerprint: a run's identity is the recipe as it was written."""
    if place is None:
        return recipe
    model, data, deploy, method = recipe.model, recipe.data, recipe.deploy, recipe.method
    if (place / model.name).exists():  # else it is a hub's name
        model = model.model_copy(update={"name": below(place, model.name)})
    if data.source != "hub":  # whose path is a data set's name
        path = below(place, data.path) if isinstance(data.path, str) else tuple(below(place, one) for one in data.path)
        data = data.model_copy(update={"path": path})
    deploy = deploy.model_copy(update={"test": below(place, deploy.test)})
    if isinstance(method, FedPEFTSettings):
        method = method.model_copy(update={"start_from": below(place, method.start_from)})
    return recipe.model_copy(update={"model": model, "data": data, "deploy": deploy, "method": method})


def below(place: Path, path: str) -> str:
    """A path from `place`; an absolute one, one from the home folder and none at all stay."""
    return str(place / path) if path and not path.startswith("~") else path
