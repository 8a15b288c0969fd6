"""Members that a run leaves out from some round on, because somebody said so while it was running.

What somebody wants is written into the journal by any process; the run looks before each round and notes from
which round it holds, so that a resumed run, a replay and an audit see the same.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal

if TYPE_CHECKING:
    from fedtune.runtime.run import Run

SAID, ABSENT = "quarantine:", "absent:"  # how the journal names what somebody wants, and what the run did


def said_of(journal: Journal) -> dict[str, dict[str, Any]]:
    """Member -> wanted (whether it is left out), why, when: written by who says so."""
    found = journal.phases(SAID)
    return {name.removeprefix(SAID): one for name, one in sorted(found.items())}


def absences(journal: Journal) -> dict[str, list[list[int | None]]]:
    """Member -> [first round, first round after it or None] of each absence: written by the run alone."""
    found = journal.phases(ABSENT)
    return {name.removeprefix(ABSENT): one["spans"] for name, one in sorted(found.items())}


def quarantine(folder: RunFolder, name: str, now: datetime, why: str = "", lift: bool = False) -> str:
    """Say that a member is left out from the next round on, or takes part again; what is said, as a sentence.
    The run may be going on. Raises C103 for a name that is nobody's, or for one that is not left out."""
    journal = Journal(folder.journal)
    try:
        names = members(folder, journal)
        if name not in names:
            raise FedtuneError(
                "C103", f"client '{name}'", f"one of {', '.join(names)[:300]}", "correct the name"
            )
        if lift and not said_of(journal).get(name, {}).get("wanted"):
            raise FedtuneError(
                "C103", f"--lift for '{name}'", "a member that is in quarantine", "leave --lift out"
            )
        journal.finish(SAID + name, {"wanted": not lift, "why": why, "when": now.isoformat()})
    finally:
        journal.close()
    return f"{name} {'takes part again' if lift else 'is left out'} from the next round on"


def listed(folder: RunFolder) -> list[str]:
    """Who is in quarantine, in sentences."""
    journal = Journal(folder.journal)
    try:
        said, known = said_of(journal), absences(journal)
    finally:
        journal.close()
    return [
        f"{name}: left out "
        + (f"from round {known[name][-1][0]} on" if known.get(name) else "from the next round on")
        + (f" ({one['why']})" if one["why"] else "")
        for name, one in said.items()
        if one["wanted"]
    ] or ["nobody"]


def members(folder: RunFolder, journal: Journal) -> tuple[str, ...]:
    """Names of the run's clients: those of real sites, or as the run has written them down."""
    recipe = recipe_of(folder)
    return recipe.deploy.sites or tuple(json.loads(journal.facts().get("clients", "[]")))


def absent(journal: Journal, number: int) -> frozenset[str]:
    """Who is left out of a round that begins now; what was said since the last one holds from here on."""
    known = absences(journal)
    for name, said in said_of(journal).items():
        spans = known.get(name, [])
        is_out = bool(spans) and spans[-1][1] is None
        if said["wanted"] and not is_out:
            spans = [*spans, [number, None]]
        elif is_out and not said["wanted"]:
            spans = [*spans[:-1], [spans[-1][0], number]]
        else:
            continue
        known[name] = spans
        journal.finish(ABSENT + name, {"spans": spans})
    return frozenset(name for name, spans in known.items() if covers(spans, number))


def covers(spans: list[list[int | None]], number: int) -> bool:
    """
    >>> [covers([[2, 4], [6, None]], number) for number in (1, 2, 3, 4, 5, 6, 99)]
    [False, True, True, False, False, True, True]
    """
    return any((first or 0) <= number < (end or number + 1) for first, end in spans)


def present_now(work: Run, number: int) -> tuple[int, ...]:
    """Numbers of the clients that may be asked in a round that begins now."""
    gone, names = absent(work.journal, number), work.workspace.names
    return tuple(client for client in work.workspace.present if names[client] not in gone)


def absent_until(folder: RunFolder, number: int) -> None:
    """A run that was rolled back knows absences up to its round; what is wanted holds from then on."""
    journal = Journal(folder.journal)
    try:
        for name, spans in absences(journal).items():
            known = [[a, b if b and b <= number else None] for a, b in spans if a and a <= number]
            journal.finish(ABSENT + name, {"spans": known})
    finally:
        journal.close()


def carried_over(old: Journal, new: Journal) -> None:
    """What was said of members of a run, and when they were absent, for its replay."""
    for prefix in (SAID, ABSENT):
        for name, one in old.phases(prefix).items():
            new.finish(name, one)
