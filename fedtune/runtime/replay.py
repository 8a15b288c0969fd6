"""Rounds of a run computed again in a new folder: what its journal says, what is still on disk, and how the
new run begins from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Recipe
from fedtune.data import Federation, load
from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.exports import whole_folder
from fedtune.runtime.best import ROUND
from fedtune.runtime.canary import CANARY
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.journal import AnswerRecord, Committed, Journal
from fedtune.runtime.paths import located
from fedtune.runtime.quarantine import absences, carried_over

FACTS = ("base", "start", "labels")  # of the journal, alike in both runs


@dataclass(frozen=True)
class Record:
    """What a run's journal says of it."""

    facts: dict[str, str]
    rounds: list[Committed]
    answers: list[tuple[int, AnswerRecord]]
    absences: dict[str, list[list[int | None]]]

    @classmethod
    def of(cls, folder: RunFolder) -> Record:
        """Raises R402 for a run without a committed round, R403."""
        journal = Journal(folder.journal)
        try:
            journal.check()
            record = cls(journal.facts(), journal.rounds(), journal.answers(), absences(journal))
        finally:
            journal.close()
        if not record.rounds:
            raise FedtuneError(
                "R402",
                f"no committed round in '{folder.path}'",
                "a run with at least one",
                f"start it anew with sampling.without, or go on with: fedtune resume {folder.path}",
            )
        return record


def members(recipe: Recipe, folder: RunFolder, record: Record) -> Federation:
    """The run's clients; of a deployed run, their names. Raises R406 where the data are not the run's."""
    here = located(recipe, folder.origin())
    if deployed(folder):
        from fedtune.runtime.check import federation_of

        return federation_of(here)
    federation = load(here.data, here.partition, here.seed)
    now, then = federation.without(recipe.sampling.without).fingerprint, record.facts.get("data", "")
    if now != then:
        raise FedtuneError(
            "R406",
            f"data that have changed since the run ({now[:12]} now, {then[:12]} then)",
            "the rows of the run, from which its members' answers were made",
            "restore them",
        )
    return federation


def deployed(folder: RunFolder) -> bool:
    return (folder.path / "deploy.json").exists()


def stored(folder: RunFolder, record: Record, most: int) -> int:
    """The last round up to `most` whose state and whose clients' states are still on disk; 0 for none."""
    for row in reversed(record.rounds[:most]):
        files = {folder.state(row.number): row.file_sha256} | client_states(folder, record, row.number)
        if all(same_file(path, sha256) for path, sha256 in files.items()):
            return row.number
    return 0


def client_states(folder: RunFolder, record: Record, number: int) -> dict[Path, str]:
    """What clients kept after round `number`: files and their SHA-256."""
    last = {
        a.client: (n, a.client_state_sha256) for n, a in record.answers if n <= number and a.outcome == "ok"
    }
    return {folder.client_state(client, n): sha256 for client, (n, sha256) in last.items() if sha256}


def same_file(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def begin(
    new: RunFolder, old: RunFolder, record: Record, kept: int, recipe: Recipe, federation: Federation
) -> None:
    """The new folder as that of a run of `recipe` on `federation` that has come as far as round `kept` of the
    old one, whole or not at all."""
    facts = {key: record.facts[key] for key in FACTS if key in record.facts}
    facts |= {"recipe": recipe.fingerprint, "data": federation.fingerprint}
    facts["clients"] = json.dumps([one.name for one in federation.clients])
    with whole_folder(new.path) as place:
        made = RunFolder(place)
        (place / "state").mkdir(parents=True)
        source, journal = Journal(old.journal), Journal(made.journal)
        try:
            journal.remember(facts)
            carried_over(source, journal)
            for row in record.rounds[:kept]:
                answers = [answer for number, answer in record.answers if number == row.number]
                journal.commit(
                    row.number, row.state_sha256, row.file_sha256, row.seconds, row.metrics, answers
                )
            if recipe.fingerprint == record.facts.get("recipe"):  # else they were made with others' rows
                scores_until(kept, source, journal)
        finally:
            source.close()
            journal.close()
        files = [old.state(kept), *client_states(old, record, kept)] if kept else []
        for path in files:
            write_atomic(place / path.relative_to(old.path), path.read_bytes())
        made.write_json("origin.json", {"working_directory": str(old.origin() or Path.cwd())})
        made.write_json("config.json", recipe.model_dump(mode="json"))


def scores_until(kept: int, old: Journal, new: Journal) -> None:
    """What was scored of the model before the first round and up to a round."""
    if base := old.phase("base"):
        new.finish("base", base)
    for prefix in (ROUND, CANARY):
        for name, score in old.phases(prefix).items():
            if int(name.removeprefix(prefix)) <= kept:
                new.finish(name, score)


def compare(old: Record, new: Record, numbers: Iterable[int]) -> int:
    """How many rounds were computed again in which nothing should have changed. Raises R421 where one has."""
    count = 0
    for number in numbers:
        was, now = old.rounds[number - 1].state_sha256, new.rounds[number - 1].state_sha256
        if was != now:
            raise FedtuneError(
                "R421",
                f"round {number} with state {now[:12]} in the replay",
                f"{was[:12]}, as the run had",
                "replay on the machine and with the versions that made the run",
            )
        count += 1
    return count
