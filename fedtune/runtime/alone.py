"""What a federation is measured against: every client by itself, and all rows in one place, from its first
state.

A client alone trains for the steps of one that takes part in every round. So does the one place, on the
batches of all clients at once: as many steps, and as many examples as in the whole federation. Where the
model is small, these trainings run side by side, one a core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedtune import progress
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, Scored, Waiting
from fedtune.forks import Forks
from fedtune.methods import Method
from fedtune.rng import seed_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.sampling import wanted
from fedtune.runtime.workspace import Workspace
from fedtune.threads import available_cores, threads_for
from fedtune.types import State

FALLING = ("perplexity",)  # figures that are better when they are lower
NOT_SCORED: dict[str, Any] = {"metric": "", "value": None, "loss": None}
SMALL = 50_000_000  # parameters of a model up to which one core per training is better than all for each
MOST = 8  # forks, each with its own gradients and activations


def trained_alone(
    recipe: Recipe, workspace: Workspace, start: State, journal: Journal, tell: Callable[[Event], None]
) -> dict[str, dict[str, Any]]:
    """Score of each training that the recipe asks for: "centralised", and "local:<client>". Those that the
    journal knows are not repeated after a crash."""
    wants = recipe.evaluate
    numbers = {"centralised": -1} if wants.centralised else {}
    numbers |= {f"local:{n}": n for n in workspace.present} if wants.local else {}
    numbers = {again(name, k): n for name, n in numbers.items() for k in range(wants.seeds)}
    found = {name: done for name in numbers if (done := journal.phase(name)) is not None}
    left = [name for name in numbers if name not in found]
    if not left:
        return {name: found[name] for name in numbers}
    prepare(workspace, [numbers[name] for name in left])
    tell(Waiting(f"comparisons: {len(left)} trainings from the same start, without federation"))
    jobs = [partial(attempt, recipe, workspace, start, name, numbers[name]) for name in left]
    forks = Forks(jobs, side_by_side(workspace), one_thread)
    for count, (place, done) in enumerate(forks.results(), 1):
        name = left[place]
        progress.say("comparisons", count, len(left))
        if done["value"] is None:
            tell(Noted(f"not scored: {name}. {done['reason']}"))
        else:
            tell(Scored(name, recipe.rounds, done["metric"], done["value"], done["loss"]))
        journal.finish(name, done)
        found[name] = done
    return {name: found[name] for name in numbers}


def again(name: str, repeat: int) -> str:
    """The name of a comparison with its second, third, ... seed."""
    return f"{name}:seed{repeat + 1}" if repeat else name


def prepare(workspace: Workspace, numbers: list[int]) -> None:
    """Make once, here, what all of them read."""
    workspace.test()
    parts = {number: workspace.pooled() if number < 0 else workspace.train(number) for number in numbers}
    if workspace.tunable.keeps_front:
        from fedtune.model.kept_front import rows_of

        for encoded in parts.values():
            rows_of(workspace.tunable, encoded)


def attempt(recipe: Recipe, workspace: Workspace, start: State, name: str, number: int) -> dict[str, Any]:
    """A training and its score; one that fails is null and says why: a comparison must not cost the run its
    result."""
    from fedtune.model.score import score

    repeat = int(name.rpartition(":seed")[2]) - 1 if ":seed" in name else 0
    seed = seed_of("alone", recipe.seed, number + 1, *([repeat] if repeat else []))
    try:
        if number < 0:
            method, data = one_place(recipe, workspace), workspace.pooled()
        else:
            method, data = recipe.method.build(recipe.rounds, recipe.aggregate), workspace.train(number)
        method.alone(workspace.tunable, data, start, seed)
        got = score(workspace.tunable, workspace.test(), recipe.evaluate.batch, workspace.front())
    except Exception as error:
        return {**NOT_SCORED, "reason": reason_of(error)}
    return {"metric": got.name, "value": got.metric, "loss": got.loss}


def one_place(recipe: Recipe, workspace: Workspace) -> Method:
    """As many steps as a client makes in all rounds, each of which takes the batches of all clients that a
    round asks: the examples of the whole federation, with as little noise in a step as its mean has."""
    clients = min(wanted(recipe.sampling, len(workspace.names)), len(workspace.present))
    table = recipe.method.at_once(clients)
    rounds = recipe.rounds if table else recipe.rounds * clients
    return (table or recipe.method).build(rounds, recipe.aggregate)


def side_by_side(workspace: Workspace) -> int:
    """How many trainings go on at once, where each can do with one thread: as many as threads are allowed, or
    one a core, as clients do, where a client has one."""
    small = workspace.base.device.type == "cpu" and workspace.tunable.total <= SMALL
    threads = threads_for(workspace.recipe.model.threads)[0]
    return min(threads if threads > 1 else available_cores(), MOST) if small else 1


def one_thread() -> None:
    from fedtune.model.hardware import use_threads

    use_threads(1)


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, FedtuneError) else f"{type(error).__name__}: {str(error)[:200]}"
