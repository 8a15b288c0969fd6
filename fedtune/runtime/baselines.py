"""The scores of a run: the base, the federation, and what it is measured against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, Scored
from fedtune.methods import Method
from fedtune.runtime.alone import FALLING, NOT_SCORED, reason_of, trained_alone
from fedtune.runtime.also_scored import ALSO, also_scored
from fedtune.runtime.figures import figures
from fedtune.runtime.journal import Journal
from fedtune.runtime.workspace import Workspace
from fedtune.types import State


def compare(
    recipe: Recipe,
    workspace: Workspace,
    method: Method,
    start: State,
    states: Mapping[int, State],
    journal: Journal,
    tell: Callable[[Event], None],
) -> dict[str, Any]:
    """Scores by phase; finished phases are in the journal and are not repeated after a crash.

    states  by their rounds: the one that is kept, and the last one where that is another
    """
    (kept, state), *others = states.items()

    def phase(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return finished_phase(journal, name, work, tell)

    def federated(number: int, name: str) -> dict[str, Any]:
        method.install(states[number], workspace.tunable)
        return score_test(workspace, name, number, tell)

    final = phase("federated", partial(federated, kept, "federated"))
    metric = final["metric"] or (journal.phase("base") or NOT_SCORED)["metric"]
    scores: dict[str, Any] = {
        "figures": {"federated": final.get("figures", {})},
        "metric": metric,
        "federated": final["value"],
        "loss": {"federated": final["loss"]},
    }
    for last, _ in others:
        scores["federated_last"] = phase("last", partial(federated, last, "federated, last round"))["value"]
    base = journal.phase("base")
    if base:
        scores |= {"base": base["value"]}
        scores["figures"]["base"] = base.get("figures", {})
        scores["loss"]["base"] = base["loss"]
    scores["samples"] = samples_of(base or {}, final)
    if recipe.evaluate.clients:
        scores["clients_metric"] = phase("clients", lambda: own_scores(workspace, method, state, tell))
    scores["also"] = {
        name.removeprefix(ALSO): phase(name, work)["value"]
        for name, work in also_scored(recipe, workspace, start, state, tell).items()
    }
    found = trained_alone(recipe, workspace, start, journal, tell)
    for name in ("centralised", "local"):
        values = [one for key, one in found.items() if key.partition(":")[0] == name]
        if values:
            scores[name] = mean_of(one["value"] for one in values)
            scores["loss"][name] = mean_of(one["loss"] for one in values)
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
            reason = reason_of(error)
            tell(Noted(f"not scored: {name}. {reason}"))
            done = {**NOT_SCORED, "reason": reason}
        journal.finish(name, done)
    return done


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean over what was scored; None where nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread_of(clients: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Of every client's score on its own held-out rows: mean, worst, and standard deviation over the clients;
    None where nobody was scored.

    >>> spread_of({"a": {"name": "accuracy", "metric": 0.5}, "b": {"name": "accuracy", "metric": 0.7}})
    {'clients': 2, 'mean': 0.6, 'worst': 0.5, 'worst_client': 'a', 'spread': 0.1}
    """
    known = {name: one for name, one in clients.items() if one is not None}
    if not known:
        return None
    values = {name: one["metric"] for name, one in known.items()}
    falling = next(iter(known.values())).get("name") in FALLING
    worst = (max if falling else min)(values, key=lambda name: values[name])
    return {
        "clients": len(values),
        "mean": round(statistics.fmean(values.values()), 12),
        "worst": values[worst],
        "worst_client": worst,
        "spread": round(statistics.pstdev(values.values()), 12),
    }


def score_test(workspace: Workspace, name: str, number: int, tell: Callable[[Event], None]) -> dict[str, Any]:
    """Score the installed state on the global test set."""
    from fedtune.model.score import score

    got = score(workspace.tunable, workspace.test(), workspace.recipe.evaluate.batch, workspace.front())
    tell(Scored(name, number, got.name, got.metric, got.loss))
    try:
        more, samples = figures(workspace, got)
    except Exception as error:
        tell(Noted(f"no [[metrics]]: {name}. {reason_of(error)}"))
        more, samples = {}, []
    found = {"metric": got.name, "value": got.metric, "loss": got.loss, "figures": more}
    return found | ({"samples": samples} if samples else {})


def samples_of(base: Mapping[str, Any], final: Mapping[str, Any]) -> list[dict[str, str]]:
    """Answers before and after training, side by side."""
    before = [one["said"] for one in base.get("samples", ())]
    return [
        {"asked": one["asked"], "wanted": one["wanted"], "federated": one["said"]}
        | ({"base": before[number]} if number < len(before) else {})
        for number, one in enumerate(final.get("samples", ()))
    ]


def own_scores(
    workspace: Workspace, method: Method, state: State, tell: Callable[[Event], None]
) -> dict[str, Any]:
    """The federated state on every client's own held-out rows, by client name; null for a client whose rows
    give no finite score."""
    method.install(state, workspace.tunable)
    return held_out_scores(workspace, tell)


def held_out_scores(workspace: Workspace, tell: Callable[[Event], None]) -> dict[str, Any]:
    """The same of what is installed."""
    from fedtune.model.score import score

    own: dict[str, Any] = {}
    for number, name in workspace.names.items():
        if not len(workspace.held_out(number)):
            continue
        try:
            got = score(workspace.tunable, workspace.held_out(number), workspace.recipe.evaluate.batch)
            own[name] = {"name": got.name, "metric": got.metric, "loss": got.loss, "count": got.count}
        except FedtuneError as error:
            tell(Noted(f"not scored: the rows held out at client {name}. {error}"))
            own[name] = None
    return own
