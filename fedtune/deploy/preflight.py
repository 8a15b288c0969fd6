"""What a coordinator needs of its own before a run is begun: the model's files, rows to score on, a recipe
that holds for its sites.

`fedtune server` looks in a process of its own, so that torch does not stay in the memory of the one that only
looks after others.
"""

from __future__ import annotations

import subprocess
import sys

from fedtune import transforms
from fedtune.config import Recipe, method_of
from fedtune.deploy.sites import at_coordinator, require_for_sites
from fedtune.deploy.supervisor import MISTAKE, read_sentence
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet
from fedtune.runtime.check import check_context


def require_ready(recipe: Recipe) -> None:
    """Raises what would end the run at its beginning: D201 to D207, M301, M306, C104. Reads no weights."""
    program = [sys.executable, "-m", "fedtune.deploy.preflight"]
    done = subprocess.run(program, input=recipe.canonical(), capture_output=True, text=True, check=False)
    last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
    if done.returncode == MISTAKE and (mistake := read_sentence(last)):
        raise mistake  # whatever else came of it, the run itself will say


def check_at_coordinator(recipe: Recipe) -> None:
    """The same, here."""
    labels = at_coordinator(recipe).labels
    method = method_of(recipe.model_copy(update={"method": recipe.method.provisional}))
    transforms.build(recipe.chain)
    check_context(recipe, labels)
    if costs := method.capabilities.costs:
        costs.plan(recipe.model, recipe.data.task, len(labels))


def remarks(recipe: Recipe) -> list[str]:
    """For `fedtune check`: what `fedtune server` would refuse in this recipe, whose sites bring their own
    rows; or on what it would score."""
    try:
        require_for_sites(recipe, recipe.deploy.sites)
        test = len(at_coordinator(recipe).test) if recipe.deploy.data == "sites" else 0
    except FedtuneError as error:
        if error.code == "D206":  # said already, with the labels that were found
            return []
        return [f"sites     fedtune server would refuse this recipe: {error}"]
    if recipe.deploy.data == "partition":
        return []
    scored = (
        f"the {test} rows of deploy.test"
        if test
        else "what the sites hold out (deploy.test names a file of the coordinator's)"
    )
    return [f"sites     ready for fedtune server; scored on {scored}"]


def main() -> None:
    quiet()
    try:
        check_at_coordinator(Recipe.model_validate_json(sys.stdin.read()))
    except FedtuneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
