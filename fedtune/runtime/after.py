"""What can be done with a run's committed state: score it again, export it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune import methods
from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.export import card, check_target, whole_folder
from fedtune.runtime.compare import own_scores, score_test
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.states import Memories, load_state
from fedtune.runtime.world import World, build_world


def evaluate_run(folder: RunFolder) -> dict[str, Any]:
    """Scores of the last committed state on the test set and on each client's own held-out rows."""
    world, number = installed(folder)
    recipe = world.recipe
    final = score_test(world, "federated", number, nobody)
    method = methods.build(recipe.method, recipe.rounds)
    return {"round": number, **final, "clients": own_scores(recipe, world, method, method.start(world.bench))}


def export_run(folder: RunFolder, form: str, to: Path) -> None:
    """Write the last committed state as an adapter or a merged model; the folder appears whole or not at all."""
    from fedtune.model.export import save_adapter, save_merged

    target = check_target(to)
    world, number = installed(folder)
    text = card(world.recipe, world.base.fingerprint, number, form=form)
    with whole_folder(target) as temporary:
        if form == "merged":
            save_merged(world.bench, temporary, text)
        else:
            save_adapter(world.bench, temporary, world.recipe.model.name, text)


def installed(folder: RunFolder) -> tuple[World, int]:
    """The run's world with its last committed state in the bench. Raises R402 where no round was committed."""
    recipe = recipe_of(folder)
    journal = Journal(folder.journal)
    try:
        journal.check()
        committed = journal.rounds()
        base = journal.facts().get("base", "")
    finally:
        journal.close()
    if not committed:
        raise FedtuneError("R402", f"no committed round in '{folder.path}'", "a run with at least one", f"go on with: fedtune resume {folder.path}")
    state, _ = load_state(folder, committed[-1].number, committed[-1].file_sha256)  # now: a run that is still going on prunes old ones
    method = methods.build(recipe.method, recipe.rounds)
    world = build_world(recipe, method, Memories(None), nobody)
    if world.base.fingerprint != base:
        raise FedtuneError(
            "M304", f"base model {world.base.fingerprint[:12]}", f"{base[:12]}, which this run was trained on", "point model.name at the same weights"
        )
    method.install(state, world.bench)
    return world, committed[-1].number


def nobody(event: Event) -> None:
    """A sink for work that is not a run."""
