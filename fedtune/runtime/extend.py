"""A run goes on for more rounds than it was begun with: the same bytes as a run of so many from the start."""

from __future__ import annotations

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal


def extend(folder: RunFolder, rounds: int) -> Recipe:
    """The run's recipe with more rounds, in its folder and its journal; scores and comparisons of the shorter
    run are forgotten.

    Raises C104 where the rounds that are done would have been others in a longer run: a schedule that depends
    on the number of rounds, a
    rule whose last round differs, real sites.
    """
    recipe = recipe_of(folder)
    if rounds < recipe.rounds:
        raise FedtuneError(
            "C104",
            f"--rounds {rounds} for a run of {recipe.rounds} rounds",
            "a higher number",
            "leave --rounds out to continue the run as it is",
        )
    for found in depends_on_rounds(recipe, folder):
        raise FedtuneError(
            "C104",
            f"--rounds for a run with {found}",
            "settings that do not depend on the number of rounds",
            "start a new run with method.start_from",
        )
    longer = recipe.model_copy(update={"rounds": rounds})
    with folder.locked():
        journal = Journal(folder.journal)
        try:
            journal.check()
            if journal.facts().get("recipe") != longer.fingerprint:
                (folder.path / "result.json").unlink(missing_ok=True)
                every = recipe.evaluate.every
                only_last = [f"round:{recipe.rounds}"] if every and recipe.rounds % every else []
                journal.extend(longer.fingerprint, only_last)
            folder.write_json("config.json", longer.model_dump(mode="json"))
        finally:
            journal.close()
    return longer


def depends_on_rounds(recipe: Recipe, folder: RunFolder) -> list[str]:
    """What of a recipe looks at the number of rounds while it trains."""
    found = []
    if (folder.path / "deploy.json").exists():
        found.append("real sites, whose clients' states belong to one recipe")
    found += recipe.method.depends_on_rounds()
    if recipe.aggregate.stays(["module.lora_A.weight", "module.lora_B.weight"]):
        found.append(
            f"aggregate.rule = '{recipe.aggregate.rule}', whose clients show in the last round what they keep"
        )
    return found
