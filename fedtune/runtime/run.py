"""A run from the first file to the last: rounds, journal, scores, comparisons, result. `resume` is the same,
later."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedtune import progress
from fedtune.config import Recipe, method_of
from fedtune.data import Federation
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, RoundDone, RoundStarted, RunDone, RunStarted, Waiting
from fedtune.runtime import privacy
from fedtune.runtime.baselines import compare, finished_phase, score_test
from fedtune.runtime.best import best_round, kept_state, round_scores, score_round, stopping_round, told
from fedtune.runtime.canary import watch_round
from fedtune.runtime.checkpoints import ClientStates, load_state, prune_states, save_state, sweep
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.data_card import data_facts, write_data_card
from fedtune.runtime.downlink import Downlink
from fedtune.runtime.first_rounds import LOOKED_AT, say_if_not_learning
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.gpu_workers import gpus_for, on_gpus
from fedtune.runtime.journal import Journal
from fedtune.runtime.local import local_transport
from fedtune.runtime.moves import keep_parts, moves_of
from fedtune.runtime.paths import located
from fedtune.runtime.phases import CLIENTS, FINAL, LOADING, SCORING, SERVER, TOKENISING, add, spent
from fedtune.runtime.protocol import Link, Transport
from fedtune.runtime.quarantine import present_now
from fedtune.runtime.resting import resting_base, rests
from fedtune.runtime.sampling import sample, wanted
from fedtune.runtime.site_scores import at_sites
from fedtune.runtime.summary import summary
from fedtune.runtime.workers import Workers, workers_for
from fedtune.runtime.workspace import Workspace, build_workspace, link_of
from fedtune.schema import digest
from fedtune.threads import describe_threads
from fedtune.types import Round, State
from fedtune.versions import versions


@dataclass
class Run:
    """Everything one run holds open."""

    recipe: Recipe
    folder: RunFolder
    journal: Journal
    workspace: Workspace
    link: Link
    transport: Transport
    tell: Callable[[Event], None]
    state: State
    done: int
    start: State  # before the first round: what the comparisons begin with
    downlink: Downlink
    trainable: int  # values that are trained; a state at the end may take a larger adapter to hold
    # seconds of all processes that worked on this run: in all, until its first round was committed, by phase
    clock: dict[str, float]
    deployed: bool = False  # on real sites: [deploy] counts

    def tick(self) -> None:
        """Take the time, so that a run that was killed knows how long it took."""
        now = time.time()
        self.clock["seconds"] += now - self.clock.pop("since")
        self.clock.setdefault("first_round_seconds", self.clock["seconds"])
        self.journal.finish("clock", self.clock)
        self.clock["since"] = now

    def spent(self, phase: str) -> AbstractContextManager[None]:
        """The time of the block counts as this phase's."""
        return spent(self.clock, phase)


def run(
    recipe: Recipe,
    folder: RunFolder,
    tell: Callable[[Event], None],
    carry: Callable[[Link, Workspace], Transport] | None = None,
    federation: Federation | None = None,
    began: float | None = None,
    workers: int = 0,
    until: int = 0,
) -> dict[str, Any]:
    """Start or continue the run in `folder`; returns what result.json holds.

    carry       makes the transport from the link and the workspace; the default keeps every client in this
                process
    federation  of real sites: who takes part, and what there is to score on
    began       when the work began that led here, in seconds since the epoch; the result's seconds count from
                then (None: from now)
    workers     processes that answer for clients, where `carry` is the default; 0: as runtime/workers.py says
    until       stop after this round, as if the process had ended there; 0: go to the end. The result is {}

    Raises FedtuneError; whatever happens, `fedtune resume` goes on after the last committed round.
    """
    since = time.time() if began is None else began
    with progress.heard_by(tell), folder.locked():
        journal, work = Journal(folder.journal), None
        try:
            done = finished(folder, journal, recipe)
            if done:
                tell(RunDone(done))
                return done
            work = open_run(recipe, folder, journal, tell, carry, federation, since, workers)
            if work.done:
                score_round(work, work.done)  # where a crash came between the round and its score
            watch_round(work, work.done)
            last = until or recipe.rounds
            for number in range(work.done + 1, last + 1):
                if stopping_round(recipe, round_scores(journal)):
                    waited = recipe.stop.patience
                    tell(Noted(f"stopped after round {number - 1}: {waited} scores without a better one"))
                    break
                if not one_round(work, number):
                    break
                with work.spent(SCORING):
                    score_round(work, number)
                    watch_round(work, number)
            result = finish(work) if last == recipe.rounds else {}
        finally:
            journal.close()
            if work and isinstance(work.transport, Workers):
                work.transport.close()
    return result


def finished(folder: RunFolder, journal: Journal, recipe: Recipe) -> dict[str, Any] | None:
    """The result of a run that is through; it is said again and not made again."""
    if not (folder.path / "result.json").exists() or journal.facts().get("recipe") != recipe.fingerprint:
        return None
    journal.check()
    result = folder.read_json("result.json")
    rounds = journal.rounds()
    through = rounds and (
        rounds[-1].number == recipe.rounds
        or stopping_round(recipe, round_scores(journal))
        or journal.phase(privacy.BUDGET)
    )
    if not through or result.get("state_sha256") != rounds[-1].state_sha256:
        return None
    load_state(folder, rounds[-1].number, rounds[-1].file_sha256)
    return result


def open_run(
    recipe: Recipe,
    folder: RunFolder,
    journal: Journal,
    tell: Callable[[Event], None],
    carry: Callable[[Link, Workspace], Transport] | None,
    federation: Federation | None,
    since: float,
    workers: int = 0,
) -> Run:
    """Build the workspace, and take up the state where the journal left it. Raises R403, R406."""
    for metric in recipe.metrics:
        metric.ready()
    privacy.require_accountant(recipe)
    place = folder.origin()
    method = method_of(located(recipe, place))
    client_states = ClientStates(folder)
    clock = {"seconds": 0.0, **(journal.phase("clock") or {}), "since": since}
    tell(Waiting("reading the data and loading the model"))
    with spent(clock, LOADING, since):
        idle = carry is not None and federation is not None and rests(recipe, federation)
        base_of = partial(resting_base, located(recipe, place)) if idle else None
        workspace = build_workspace(
            recipe, method, client_states, tell, federation, base_of, place=place, folder=folder.path
        )
    check_same(
        journal,
        {
            "recipe": recipe.fingerprint,
            "base": workspace.base.fingerprint,
            "data": workspace.federation.fingerprint,
        },
    )
    known = {"labels": workspace.federation.labels, "clients": list(workspace.names.values())}
    journal.remember({name: json.dumps(one) for name, one in known.items()})
    write_data_card(folder, recipe, workspace.federation)
    with spent(clock, TOKENISING):
        workspace.encode_all()
    journal.check()
    committed = journal.rounds()
    done = committed[-1].number if committed else 0
    counted = {
        answer.client: (number, answer.client_state_sha256)
        for number, answer in journal.answers()
        if answer.outcome == "ok"
    }
    client_states.restore(counted)
    sweep(folder)
    prune_states(folder, done, also=best_round(round_scores(journal)))
    start = method.start(workspace.tunable)
    check_same(journal, {"start": digest(start.shared)})
    state, held = load_state(folder, done, committed[-1].file_sha256) if committed else (start, None)
    downlink = Downlink(held, {client: number for client, (number, _) in counted.items()})
    link = link_of(workspace, method)
    by_default = partial(here, recipe, folder, workspace, link, tell, workers, federation is None)
    transport = carry(link, workspace) if carry else by_default()
    tunable = workspace.tunable
    tell(
        RunStarted(
            folder.path.name,
            str(folder.path),
            recipe.rounds,
            len(workspace.names),
            tunable.trainable,
            tunable.total,
            done,
            describe_threads(recipe.model.threads),
        )
    )
    if recipe.evaluate.base and workspace.federation.test and not journal.phase("base"):
        method.install(start, tunable)
        tell(Waiting("scoring the base model"))
        with spent(clock, SCORING):
            finished_phase(journal, "base", lambda: score_test(workspace, "base", 0, tell), tell)
    return Run(
        recipe,
        folder,
        journal,
        workspace,
        link,
        transport,
        tell,
        state,
        done,
        start,
        downlink,
        tunable.trainable,
        clock,
        federation is not None,
    )


def here(
    recipe: Recipe,
    folder: RunFolder,
    workspace: Workspace,
    link: Link,
    tell: Callable[[Event], None],
    asked: int,
    own_rows: bool,
) -> Transport:
    """The transport to clients on this machine: in this process, or in several."""
    logs = folder.path / "errors"
    devices, why = gpus_for(recipe, workspace, link.method, own_rows, asked)
    if devices:
        tell(Noted(f"clients are trained on {len(devices)} GPUs, in a process for each"))
        return on_gpus(link, workspace, logs, devices, folder.origin())
    count, hindered = workers_for(recipe, workspace, link.method, asked)
    if why := why or hindered:
        tell(Noted(f"one process works for all clients: {why}"))
    if count > 1:
        return Workers(link, workspace, logs, count)
    return local_transport(link, workspace.client, workspace.done, logs)


def check_same(journal: Journal, facts: Mapping[str, str]) -> None:
    """A run goes on only with the recipe, the base model and the data that it began with. Raises R406."""
    known = journal.facts()
    for key, value in facts.items():
        if known.get(key, value) != value:
            raise FedtuneError(
                "R406",
                f"a run that was started with {key} {known[key][:12]}",
                f"the same {key} (now {value[:12]})",
                "start a new run for the new one",
            )
    journal.remember(dict(facts) | {"versions": json.dumps(versions())})


def one_round(work: Run, number: int) -> bool:
    """Sample, charge, converse, commit: first the state file, then its row. False: beyond the budget."""
    began = time.time()
    recipe, workspace = work.recipe, work.workspace
    deploy = recipe.deploy if work.deployed else None
    drawn = sample(recipe.sampling, len(workspace.names), recipe.seed, number, deploy.over if deploy else 0.0)
    present = present_now(work, number)
    members = tuple(client for client in drawn if client in present)
    if not privacy.charge(work, number, members):
        return False
    now = Round(number, recipe.seed, members)
    quorum = (
        math.ceil(deploy.quorum * min(len(members), wanted(recipe.sampling, len(workspace.names))))
        if deploy
        else 0
    )
    moves = moves_of(work, number)
    cohort = RoundCohort(
        work.link, now, work.transport, work.tell, workspace.names, work.downlink, quorum=quorum, moves=moves
    )
    work.tell(RoundStarted(number, tuple(workspace.names[client] for client in members)))
    if members:
        work.state = work.link.method.round(work.state, cohort, now)
    else:
        cohort.note("skipped", 1.0)
        work.tell(Noted(f"round {number} changes nothing: whom it falls to does not take part"))
    answers = [cohort.answers[c] for c in members]
    counted = [a for a in answers if a.outcome == "ok"]
    metrics = cohort.means | cohort.notes
    file_sha256 = save_state(work.folder, number, work.state, work.downlink.held)
    remembered = workspace.client_states.save(number, [a.client for a in counted])
    answers = [replace(a, client_state_sha256=remembered.get(a.client, "")) for a in answers]
    seconds = time.time() - began
    work.journal.commit(
        number, digest(work.state.shared), file_sha256, seconds, metrics, answers, cohort.stages
    )
    workspace.client_states.prune(number, {a.client: remembered.get(a.client, "") for a in counted})
    work.downlink.last |= {a.client: number for a in counted}
    prune_states(work.folder, number, also=best_round(round_scores(work.journal)))
    add(work.clock, CLIENTS, cohort.waited)
    add(work.clock, SERVER, seconds - cohort.waited)
    work.tick()
    up, down = sum(a.up_bytes for a in answers), sum(a.down_bytes for a in answers)
    out = len(members) - len(counted)
    work.tell(RoundDone(number, len(members), out, up, down, seconds, metrics, cohort.waited))
    keep_parts(work, moves)
    if number == LOOKED_AT:
        say_if_not_learning(work)
    return True


def finish(work: Run) -> dict[str, Any]:
    """Scores, comparisons, adapter, result.json."""
    last = work.journal.rounds()[-1].number
    kept, state = kept_state(work)
    work.tell(Waiting("scoring the federated model"))
    if work.workspace.federation.test:
        states = {kept: state, last: work.state}
        with work.spent(FINAL):
            scores = compare(
                work.recipe, work.workspace, work.link.method, work.start, states, work.journal, work.tell
            )
    else:
        now = Round(last, work.recipe.seed, present_now(work, last + 1))
        everyone = RoundCohort(
            work.link, now, work.transport, work.tell, work.workspace.names, replace(work.downlink)
        )
        scores = at_sites(everyone, state.shared, work.workspace.tunable, work.journal)
    work.tick()
    result = summary(work, scores) | told(work, kept)
    leave(work, {kept: state, last: work.state}, result)
    if work.recipe.evaluate.every:
        prune_states(work.folder, last, keep=1, also=kept)
    work.folder.write_json("result.json", result)
    work.tell(RunDone(result))
    return result


def leave(work: Run, states: Mapping[int, State], result: Mapping[str, Any]) -> None:
    """adapter/ of the round that is kept, adapter-last/ of the last one where that is another."""
    from fedtune.exports import export_final

    data = data_facts(work.folder)
    targets = dict(zip(states, (work.folder.adapter, work.folder.last_adapter), strict=False))
    if len(targets) == 1:
        shutil.rmtree(work.folder.last_adapter, ignore_errors=True)
    for number, state in reversed(list(states.items())):
        work.link.method.install(state, work.workspace.tunable)
        export_final(
            work.link.method,
            state,
            work.workspace.tunable,
            targets[number],
            work.recipe,
            result,
            number,
            data,
        )
