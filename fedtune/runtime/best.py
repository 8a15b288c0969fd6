"""Which round's model is kept: the best of those that were scored, and when to stop.

All of it follows from the scores in the journal: a run that was killed decides as one that was not, on every
engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Noted, Scored
from fedtune.runtime.alone import FALLING, NOT_SCORED, reason_of
from fedtune.runtime.checkpoints import load_state, prune_states
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.journal import Journal
from fedtune.runtime.quarantine import present_now
from fedtune.runtime.site_scores import asked
from fedtune.types import Round, State

if TYPE_CHECKING:
    from fedtune.runtime.run import Run

ROUND = "round:"  # how the journal names the score of a round
Scores = Mapping[int, Mapping[str, Any]]  # round -> metric, value, loss


def round_scores(journal: Journal) -> dict[int, dict[str, Any]]:
    """Round -> its score on the rows that choose, as far as the run has come."""
    return {int(name.removeprefix(ROUND)): score for name, score in journal.phases(ROUND).items()}


def worth(score: Mapping[str, Any]) -> float:
    """A score as a number that rises; minus infinity for none, and for NaN."""
    value = score["value"]
    if value is None or not math.isfinite(value):
        return -math.inf
    return -float(value) if score["metric"] in FALLING else float(value)


def best_round(scores: Scores) -> int | None:
    """The round with the best score, of equals the first; None where no round has one.

    >>> said = lambda *values: {n: {"metric": "accuracy", "value": v} for n, v in enumerate(values, 1)}
    >>> best_round(said(0.5, 0.7, None, 0.7)), best_round(said(None, float("nan"))), best_round({})
    (2, None, None)
    """
    worths = {number: worth(score) for number, score in sorted(scores.items())}
    known = {number: value for number, value in worths.items() if value > -math.inf}
    return max(known, key=lambda number: known[number], default=None)  # max takes the first of equals


def stopping_round(recipe: Recipe, scores: Scores) -> int | None:
    """The round after which [stop] ends the run, if it has come: so many scores in a row that are not better
    than the best before them by more than min_delta."""
    best, waited = -math.inf, 0
    for number, score in sorted(scores.items()) if recipe.stop.patience else ():
        if worth(score) > best + recipe.stop.min_delta or (best == -math.inf and worth(score) > best):
            best, waited = worth(score), 0
        else:
            waited += 1
        if waited == recipe.stop.patience:
            return number
    return None


def is_due(recipe: Recipe, number: int) -> bool:
    """Whether a round is scored: every so many, and the last one."""
    every = recipe.evaluate.every
    return bool(every) and (number % every == 0 or number == recipe.rounds)


def score_round(work: Run, number: int) -> None:
    """Score the state of a round that was just committed, and keep its file as long as it is the best."""
    if not is_due(work.recipe, number) or number in round_scores(work.journal):
        return
    try:
        done = scored(work, number)
        metric, value, loss = done["metric"], done["value"], done["loss"]
        work.tell(Scored("held-out", number, metric, value, loss))
    except Exception as error:
        work.tell(Noted(f"not scored: round {number}. {reason_of(error)}"))
        done = {**NOT_SCORED, "reason": reason_of(error)}
    work.journal.finish(f"{ROUND}{number}", done)
    prune_states(work.folder, number, also=best_round(round_scores(work.journal)))


def scored(work: Run, number: int) -> dict[str, Any]:
    """The state's score on the rows that choose: clients' own held-out rows, here or at the sites."""
    from fedtune.model.score import score

    name, rows = work.workspace.choosing()
    if not len(rows):
        now = Round(number, work.recipe.seed, present_now(work, number + 1))
        everyone = RoundCohort(
            work.link, now, work.transport, work.tell, work.workspace.names, replace(work.downlink)
        )
        return asked(everyone, work.state.shared, work.workspace.tunable)
    work.link.method.install(work.state, work.workspace.tunable)
    front = work.workspace.front(name)
    got = score(work.workspace.tunable, rows, work.recipe.evaluate.batch, front)
    return {"metric": got.name, "value": got.metric, "loss": got.loss, "rows": len(rows), "of": name}


def kept_state(work: Run) -> tuple[int, State]:
    """The round whose model the run leaves, and its state: the best one, the last where none was scored."""
    last = work.journal.rounds()[-1].number
    best = best_round(round_scores(work.journal)) or last
    return best, work.state if best == last else state_of(work, best)


def state_of(work: Run, number: int) -> State:
    """Raises R403."""
    return load_state(work.folder, number, work.journal.rounds()[number - 1].file_sha256)[0]


def committed_round(journal: Journal, which: str) -> int:
    """The number of the best or the last committed round. Raises C103 for any other word."""
    if which not in ("best", "last"):
        raise FedtuneError("C103", f"round '{which}'", "best or last", "choose one of them")
    last = journal.rounds()[-1].number
    return (best_round(round_scores(journal)) or last) if which == "best" else last


def told(work: Run, kept: int) -> dict[str, Any]:
    """What result.json says of the choice."""
    scores = round_scores(work.journal)
    last = work.journal.rounds()[-1].number
    chosen = scores[kept] if best_round(scores) == kept else None
    return {
        "kept_round": kept,
        "stopped_early": last < work.recipe.rounds,
        "best": {"round": kept, **chosen} if chosen else None,
        "by_round": {str(number): score["value"] for number, score in sorted(scores.items())},
    }
