"""Scores where the coordinator has no rows of its own: every site scores the last state on what it has held out, and sums come back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import Noted, Scored
from fedtune.schema import Schema
from fedtune.types import Client, Method, Round, State, Tensors, Update, Verb

if TYPE_CHECKING:
    from fedtune.runtime.run import Run

SCORE = "score"  # the runtime's own verb, beside those of the methods
NOTHING = Schema(())  # an answer of figures alone


def scored(method: Method, batch: int) -> Verb:
    """A site's half: install what is given, score the rows that it holds out. Its weight is their number (of tokens, for language)."""

    def work(client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.score import score

        if getattr(client.model.base, "part", None) is not None:
            raise ClientFailed("S711", f"client '{client.name}', which holds two ends of a model", "the whole of it", "score at the coordinator: deploy.test")
        rows: Any = client.held_out() if client.held_out else ()
        if not len(rows):
            raise ClientFailed("D202", f"no rows held out at client '{client.name}'", "at least one", "raise data.client_test_share")
        method.install(State(given), client.model)
        got = score(client.model, rows, batch)
        return Update.of({}, float(got.count), {got.name: got.metric, "loss": got.loss})

    return work


def at_sites(work: Run) -> dict[str, Any]:
    """What compare() gives, from the sites' own rows; a state that sites cannot install by itself, or that nobody scores, is not scored."""
    done = work.journal.phase("sites")
    if done is None:
        try:
            done = asked(work)
        except FedtuneError as error:
            work.tell(Noted(f"the last state was not scored at the sites. {error}"))
            done = {"metric": "", "value": None, "loss": None}
        work.journal.finish("sites", done)
    return {"metric": done["metric"], "federated": done["value"], "loss": {"federated": done["loss"]}}


def asked(work: Run) -> dict[str, Any]:
    """Raises R405 where nobody could score, C104 where the state is not what sites are given in a round."""
    from fedtune.runtime.cohort import RoundCohort

    rounds, names, method = work.recipe.rounds, work.world.names, work.link.method
    now = Round(rounds, work.recipe.seed, tuple(names))
    shared = work.state.shared
    if any(method.given("train", work.world.bench, client, now).entries != Schema.of(shared).entries for client in names):
        found = f"a state of '{method.title}' that a site cannot score by itself"
        raise FedtuneError("C104", found, "one that it can", "give the coordinator rows to score on: deploy.test")
    cohort = RoundCohort(work.link, now, work.carrier, work.tell, names, replace(work.downlink))
    mean = cohort.sum(SCORE, shared).mean()
    name = "perplexity" if "perplexity" in mean.metrics else "accuracy"
    value = math.exp(mean.metrics["loss"]) if name == "perplexity" else mean.metrics[name]
    work.tell(Scored("federated", rounds, name, value, mean.metrics["loss"]))
    return {"metric": name, "value": value, "loss": mean.metrics["loss"]}
