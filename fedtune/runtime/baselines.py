"""What the federation is measured against: the base, every client alone, everything in one place; same steps
each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, Scored
from fedtune.methods import Method
from fedtune.rng import seed_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.workspace import Workspace
from fedtune.types import State

NOT_SCORED: dict[str, Any] = {"metric": "", "value": None, "loss": None}


def compare(
    recipe: Recipe,
    workspace: Workspace,
    method: Method,
    start: State,
    state: State,
    journal: Journal,
    tell: Callable[[Event], None],
) -> dict[str, Any]:
    """Scores by phase; finished phases are in the journal and are not repeated after a crash."""

    def phase(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return finished_phase(journal, name, work, tell)

    def federated() -> dict[str, Any]:
        method.install(state, workspace.tunable)
        return score_test(workspace, "federated", recipe.rounds, tell)

    final = phase("federated", federated)
    metric = final["metric"] or (journal.phase("base") or NOT_SCORED)["metric"]
    scores: dict[str, Any] = {
        "metric": metric,
        "federated": final["value"],
        "loss": {"federated": final["loss"]},
    }
    base = journal.phase("base")
    if base:
        scores |= {"base": base["value"]}
        scores["loss"]["base"] = base["loss"]
    if recipe.evaluate.clients:
        scores["clients_metric"] = phase(
            "clients", lambda: own_scores(recipe, workspace, method, state, tell)
        )
    if recipe.evaluate.centralised:
        pooled = phase(
            "centralised", lambda: alone(recipe, workspace, method, start, -1, "centralised", tell)
        )
        scores["centralised"] = pooled["value"]
        scores["loss"]["centralised"] = pooled["loss"]
    if recipe.evaluate.local:
        each = [
            phase(f"local:{n}", partial(alone, recipe, workspace, method, start, n, f"local:{n}", tell))
            for n in workspace.names
        ]
        scores["local"] = mean_of(one["value"] for one in each)
        scores["loss"]["local"] = mean_of(one["loss"] for one in each)
    return scores


def finished_phase(
    journal: Journal, name: str, work: Callable[[], dict[str, Any]], tell: Callable[[Event], None]
) -> dict[str, Any]:
    """What a phase found, now or before a crash. One that fails is null and says why: a comparison must not
    cost the run its result."""
    done = journal.phase(name)
    if done is None:
        try:
            done = work()
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, FedtuneError)
                else f"{type(error).__name__}: {str(error)[:200]}"
            )
            tell(Noted(f"not scored: {name}. {reason}"))
            done = {**NOT_SCORED, "reason": reason}
        journal.finish(name, done)
    return done


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean over what was scored; None where nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def score_test(workspace: Workspace, name: str, number: int, tell: Callable[[Event], None]) -> dict[str, Any]:
    """Score the installed state on the global test set."""
    from fedtune.model.score import score

    got = score(workspace.tunable, workspace.test(), workspace.recipe.evaluate.batch)
    tell(Scored(name, number, got.name, got.metric, got.loss))
    return {"metric": got.name, "value": got.metric, "loss": got.loss}


def own_scores(
    recipe: Recipe, workspace: Workspace, method: Method, state: State, tell: Callable[[Event], None]
) -> dict[str, Any]:
    """The federated state on every client's own held-out rows, by client name; null for a client whose rows
    give no finite score."""
    from fedtune.model.score import score

    method.install(state, workspace.tunable)
    own: dict[str, Any] = {}
    for number, name in workspace.names.items():
        if not len(workspace.held_out(number)):
            continue
        try:
            got = score(workspace.tunable, workspace.held_out(number), recipe.evaluate.batch)
            own[name] = {"metric": got.metric, "loss": got.loss, "count": got.count}
        except FedtuneError as error:
            tell(Noted(f"not scored: the rows held out at client {name}. {error}"))
            own[name] = None
    return own


def alone(
    recipe: Recipe,
    workspace: Workspace,
    method: Method,
    start: State,
    number: int,
    name: str,
    tell: Callable[[Event], None],
) -> dict[str, Any]:
    """Train from the first state on one client's data (-1: on all clients' data), as many steps as a client
    made in the run."""
    method.alone(
        workspace.tunable,
        workspace.pooled() if number < 0 else workspace.train(number),
        start,
        seed_of("alone", recipe.seed, number + 1),
    )
    return score_test(workspace, name, recipe.rounds, tell)
