"""Models that a method has scored beside its run's own, to say what that is worth: an emulator, say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedtune.config import Recipe
from fedtune.events import Event, Scored, Waiting
from fedtune.methods.interface import RunEnd
from fedtune.rng import seed_of
from fedtune.runtime.alone import one_place
from fedtune.runtime.workspace import Workspace
from fedtune.types import State

ALSO = "also:"  # how the journal names them


def also_scored(
    recipe: Recipe, workspace: Workspace, start: State, state: State, tell: Callable[[Event], None]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name in the journal -> what scores the model on the test set, as `baselines.finished_phase` does it."""
    method = one_place(recipe, workspace)
    end = RunEnd(start, state, workspace.tunable, workspace.pooled, seed_of("alone", recipe.seed, 0))

    def work(name: str, made: Callable[[RunEnd], Any]) -> dict[str, Any]:
        from fedtune.model.score import score

        tell(Waiting(f"scoring: {name}"))
        got = score(made(end), workspace.test(), recipe.evaluate.batch)
        tell(Scored(name, 0, got.name, got.metric, got.loss))
        return {"metric": got.name, "value": got.metric, "loss": got.loss}

    return {
        f"{ALSO}{name}": partial(work, name, made) for name, made in method.capabilities.also_scored.items()
    }
