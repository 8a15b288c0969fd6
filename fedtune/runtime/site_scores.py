"""Scores where the coordinator has no rows of its own: every site scores the last state on what it has held
out, and sums come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import Noted, Scored
from fedtune.methods import Method, Work
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.journal import Journal
from fedtune.runtime.task import Task
from fedtune.schema import Schema
from fedtune.transforms.base import Chain, Question
from fedtune.types import Client, Round, State, Tensors, Update

SCORE = "score"  # the runtime's own verb, beside those of the methods
NOTHING = Schema(())  # an answer of figures alone


def score_task(method: Method, batch: int, chain: Chain, run: str) -> Task:
    """The score as a task of the run's. A client is given what it is given with the first of the method's
    verbs; where a chain hides single answers, it hides single scores."""
    first = next(iter(method.verbs.values()))
    about = Question(run, SCORE, moves=False, figures=("accuracy", "loss", "perplexity"))
    hidden = chain.bound(about) if chain.hides else Chain()
    return Task(scored(method, batch), first.given, lambda given, now: NOTHING, hidden, trains=False)


def scored(method: Method, batch: int) -> Work:
    """A site's half: install what is given, score the rows that it holds out. Its weight is their number (of
    tokens, for language)."""

    def work(client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.score import score

        split = method.capabilities.split
        if split is not None and split.holds_parts(client.model):
            raise ClientFailed(
                "S711",
                sentence=f"client '{client.name}' has only head and tail of the model, and cannot score it",
                do="let the coordinator score: set deploy.test",
            )
        rows: Any = client.held_out() if client.held_out else ()
        if not len(rows):
            raise ClientFailed(
                "D202",
                f"no rows held out at client '{client.name}'",
                "at least one",
                "raise data.client_test_share",
            )
        method.install(State(given), client.model)
        got = score(client.model, rows, batch)
        return Update.of({}, float(got.count), {got.name: got.metric, "loss": got.loss})

    return work


def at_sites(cohort: RoundCohort, shared: Tensors, tunable: Any, journal: Journal) -> dict[str, Any]:
    """What compare() gives, from the sites' own rows; a state that sites cannot install by itself, or that
    nobody scores, is not scored."""
    done = journal.phase("sites")
    if done is None:
        try:
            done = asked(cohort, shared, tunable)
            cohort.tell(Scored("federated", cohort.now.number, done["metric"], done["value"], done["loss"]))
        except FedtuneError as error:
            cohort.tell(Noted(f"the last state was not scored at the sites. {error}"))
            done = {"metric": "", "value": None, "loss": None}
        journal.finish("sites", done)
    return {
        "metric": done["metric"],
        "federated": done["value"],
        "loss": {"federated": done["loss"]},
        "clients_metric": done.get("clients", {}),
    }


def asked(cohort: RoundCohort, shared: Tensors, tunable: Any) -> dict[str, Any]:
    """Raises R405 where nobody could score, C104 where the state is not what sites are given in a round."""
    link, now = cohort.link, cohort.now
    if any(
        link.tasks[SCORE].given(tunable, client, now).entries != Schema.of(shared).entries
        for client in now.members
    ):
        raise FedtuneError(
            "C104",
            sentence=f"a site alone cannot score the state of '{link.method.facts.title}'",
            do="give the coordinator rows to score on: set deploy.test",
        )
    mean = cohort.sum(SCORE, shared).mean()
    name = "perplexity" if "perplexity" in mean.metrics else "accuracy"
    value = math.exp(mean.metrics["loss"]) if name == "perplexity" else mean.metrics[name]
    return {
        "metric": name,
        "value": value,
        "loss": mean.metrics["loss"],
        "clients": {
            cohort.names[client]: own(cohort, client, sums) for client, _, sums in cohort.figures if sums
        },  # under a mask, nobody's
    }


def own(cohort: RoundCohort, client: int, sums: Mapping[str, float]) -> dict[str, Any]:
    """One site's score on its rows; sums are over its rows."""
    weight = cohort.answers[client].weight
    name = "perplexity" if "perplexity" in sums else "accuracy"
    return {
        "name": name,
        "metric": sums[name] / weight,
        "loss": sums["loss"] / weight,
        "count": int(weight),
    }
