"""What the federation is measured against: the base, every client alone, everything in one place; same steps each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.config import Recipe
from fedtune.events import Event, Scored
from fedtune.rng import seed_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.world import World
from fedtune.types import Method, State


def compare(recipe: Recipe, world: World, method: Method, start: State, state: State, journal: Journal, tell: Callable[[Event], None]) -> dict[str, Any]:
    """Scores by phase; finished phases are in the journal and are not repeated after a crash."""

    def phase(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        done = journal.phase(name)
        if done is None:
            done = work()
            journal.finish(name, done)
        return done

    def federated() -> dict[str, Any]:
        method.install(state, world.bench)
        return score_test(world, "federated", recipe.rounds, tell)

    final = phase("federated", federated)
    scores: dict[str, Any] = {"metric": final["metric"], "federated": final["value"], "loss": {"federated": final["loss"]}}
    base = journal.phase("base")
    if base:
        scores |= {"base": base["value"]}
        scores["loss"]["base"] = base["loss"]
    if recipe.evaluate.clients:
        scores["clients_metric"] = phase("clients", lambda: own_scores(recipe, world, method, state))
    if recipe.evaluate.centralised:
        pooled = phase("centralised", lambda: alone(recipe, world, method, start, -1, "centralised", tell))
        scores["centralised"] = pooled["value"]
        scores["loss"]["centralised"] = pooled["loss"]
    if recipe.evaluate.local:
        each = [phase(f"local:{n}", lambda n=n: alone(recipe, world, method, start, n, f"local:{n}", tell)) for n in world.names]  # type: ignore[misc]
        scores["local"] = sum(one["value"] for one in each) / len(each)
        scores["loss"]["local"] = sum(one["loss"] for one in each) / len(each)
    return scores


def score_test(world: World, name: str, number: int, tell: Callable[[Event], None]) -> dict[str, Any]:
    """Score the installed state on the global test set."""
    from fedtune.model.score import score

    got = score(world.bench, world.test(), world.recipe.evaluate.batch)
    tell(Scored(name, number, got.name, got.metric, got.loss))
    return {"metric": got.name, "value": got.metric, "loss": got.loss}


def own_scores(recipe: Recipe, world: World, method: Method, state: State) -> dict[str, Any]:
    """The federated state on every client's own held-out rows, by client name."""
    from fedtune.model.score import score

    method.install(state, world.bench)
    own = {}
    for number, name in world.names.items():
        if len(world.held_out(number)):
            got = score(world.bench, world.held_out(number), recipe.evaluate.batch)
            own[name] = {"metric": got.metric, "loss": got.loss, "count": got.count}
    return own


def alone(recipe: Recipe, world: World, method: Method, start: State, number: int, name: str, tell: Callable[[Event], None]) -> dict[str, Any]:
    """Train from the first state on one client's data (-1: on all clients' data), as many steps as a client made in the run."""
    method.alone(world.bench, world.pooled() if number < 0 else world.train(number), start, seed_of("alone", recipe.seed, number + 1))
    return score_test(world, name, recipe.rounds, tell)
