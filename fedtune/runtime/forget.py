"""A run without some of its members, as if they had never taken part: the rounds are replayed without them.

The law: the replay of a run without a member ends with the `state_sha256` of a run of the same recipe with
`sampling.without = ["member"]`. Who is drawn for a round, the others' seeds, the partition of the data and
the label set stay as they are; the member's place stays empty, and its rows are not read. So a run in which
the member is drawn but never answers ends with the same bytes.

From the first round that a member took part in, every later answer of everybody depends on it and has to be
made anew. What is on disk saves only rounds before that one: the last two states that a run keeps, and the
best one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.data import Federation
from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.runtime.certificate import certificate
from fedtune.runtime.folder import RunFolder, recipe_of, taken
from fedtune.runtime.quarantine import covers
from fedtune.runtime.replay import Record, begin, compare, deployed, members, stored
from fedtune.runtime.run import run
from fedtune.runtime.sampling import sample
from fedtune.sinks import sink_of
from fedtune.versions import versions

FORGOTTEN = "forgotten"  # in the new run's folder: its certificates


@dataclass(frozen=True)
class Plan:
    """What it takes to forget.

    names     who is forgotten
    first     the first round that one of them was asked in; 0: none ever was
    kept      the last round that need not be computed again
    rounds    of the run, all of which the new one has
    asked     member -> how many times it has to answer again
    up, down  bytes that the same answers and questions took the first time
    seconds   that the same rounds took the first time
    recipe    of the new run
    """

    names: tuple[str, ...]
    first: int
    kept: int
    rounds: int
    asked: dict[str, int]
    up: int
    down: int
    seconds: float
    recipe: Recipe

    def told(self) -> list[str]:
        """The cost, in sentences."""
        who = ", ".join(self.names)
        if not self.first:
            return [f"{who}: never asked in this run; nothing has to be computed again"]
        answers = sum(self.asked.values())
        saved = f"; rounds 1 to {self.kept} are kept" if self.kept else ""
        return [
            f"{who}: first asked in round {self.first} of {self.rounds}, and everything after depends on it",
            f"replay {self.rounds - self.kept} rounds{saved}",
            f"{len(self.asked)} members answer {answers} times: {', '.join(self.asked)}",
            f"the first time this took {self.seconds:.1f} s, {self.up:,} bytes up and {self.down:,} down",
        ]


def plan(folder: RunFolder, names: Sequence[str], federation: Federation | None = None) -> Plan:
    """Raises C103 for a name that is nobody's, or nobody's but theirs; R402, R403, R406."""
    recipe, record = recipe_of(folder), Record.of(folder)
    known = [one.name for one in (federation or members(recipe, folder, record)).clients]
    gone = tuple(dict.fromkeys([*recipe.sampling.without, *names]))
    if unknown := [name for name in names if name not in known]:
        found = f"client '{unknown[0]}'"
        raise FedtuneError("C103", found, f"one of {', '.join(known)[:300]}", "correct --client")
    if not set(known) - set(gone):
        raise FedtuneError("C103", "every client of the run", "one that stays", "delete the run instead")
    numbers = {known.index(name) for name in names}
    first = min((number for number, answer in record.answers if answer.client in numbers), default=0)
    most = len(record.rounds)
    # scores of earlier rounds, by which a run chooses and stops, were made with these members' rows
    kept = 0 if recipe.evaluate.every else stored(folder, record, first - 1 if first else most)
    asked: dict[str, int] = {}
    for number in range(kept + 1, recipe.rounds + 1):
        for name in (known[client] for client in sample(recipe.sampling, len(known), recipe.seed, number)):
            if name not in gone and not covers(record.absences.get(name, []), number):
                asked[name] = asked.get(name, 0) + 1
    again = [
        answer
        for number, answer in record.answers
        if number > kept and known[answer.client] not in gone and answer.outcome == "ok"
    ]
    sampling = recipe.sampling.model_copy(update={"without": gone})
    return Plan(
        tuple(names),
        first,
        kept,
        recipe.rounds,
        asked,
        sum(answer.up_bytes for answer in again),
        sum(answer.down_bytes for answer in again),
        sum(row.seconds for row in record.rounds[kept:]),
        recipe.model_copy(update={"sampling": sampling}),
    )


@dataclass(frozen=True)
class Forgotten:
    """The new run: its folder, its result, the certificate."""

    folder: Path
    result: dict[str, Any]
    certificate: Path


def beside(folder: RunFolder, names: Iterable[str]) -> Path:
    """Where the new run goes, unless somebody says."""
    safe = "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", name)[:40] for name in names)
    return folder.path.parent / f"{folder.path.name}-without-{safe}"


def forget(
    folder: RunFolder,
    names: Sequence[str],
    target: Path,
    now: datetime,
    keys: Path | None = None,
    tell: Sequence[Callable[[Event], None]] = (),
) -> Forgotten:
    """Replay a run of this machine without some members, in a new folder. A replay that was cut off goes on.

    keys  of a member that signs the certificate
    tell  who is told the new run's events, beside its folder

    Raises C104 for a deployed or private run, R421 where this machine computes other bytes than the run's,
    R401, and what `plan` and `run` raise. The old run is left as it is.
    """
    if deployed(folder):
        gone = json.dumps([*recipe_of(folder).sampling.without, *names])
        raise FedtuneError(
            "C104",
            f"a run on real sites, {', '.join(plan(folder, names).asked)} of which have to answer again",
            "a run whose clients are all on this machine",
            f"start a new run of its recipe with sampling.without = {gone}: fedtune server",
        )
    record, old = Record.of(folder), recipe_of(folder)
    if any(release.noise for release in old.spends):
        raise FedtuneError(
            "C104",
            "a private run, whose noise nobody can draw again",
            "a run whose rounds can be replayed",
            "start a new run of its recipe with sampling.without",
        )
    federation = members(old, folder, record)
    planned = plan(folder, names, federation)
    began = RunFolder(target)
    if not target.exists():
        left = federation.without(planned.recipe.sampling.without)
        begin(began, folder, record, planned.kept, planned.recipe, left)
    elif Record.of(began).facts.get("recipe") != planned.recipe.fingerprint:
        raise taken(target)
    result = run(planned.recipe, began, sink_of(target, planned.recipe.sinks, *tell))
    untouched = range(planned.kept + 1, planned.first or len(record.rounds) + 1)
    compared = compare(record, Record.of(began), untouched)
    said = {
        "what": f"run '{folder.path.name}' was computed again without {', '.join(names)}",
        "when": now.isoformat(),
        "clients": list(names),
        "first_round_asked": planned.first,
        "rounds": len(Record.of(began).rounds),
        "rounds_kept": planned.kept,
        "rounds_compared": compared,
        "recipe_before": old.fingerprint,
        "recipe_after": planned.recipe.fingerprint,
        "state_before": record.rounds[-1].state_sha256,
        "state_after": result["state_sha256"],
        "base_fingerprint": record.facts.get("base", ""),
        "versions": versions(),
    }
    path = target / FORGOTTEN / f"{now.strftime('%Y%m%dT%H%M%S%f')}.json"
    write_atomic(path, certificate(said, keys))
    return Forgotten(target, result, path)
