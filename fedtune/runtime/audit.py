"""The coordinator's audit log: what happened in a run, in a file that cannot be changed unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedtune.events import (
    Alarm,
    ClientDone,
    ClientLeftOut,
    Event,
    Noted,
    RoundDone,
    RunDone,
    RunStarted,
    Sink,
)
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.quarantine import absences
from fedtune.trust.chained_log import FILE, ChainedLog

if TYPE_CHECKING:
    from fedtune.trust.identity import Identity

KEPT = (Alarm, ClientDone, ClientLeftOut, Noted, RoundDone, RunDone, RunStarted)


def audit_sink(folder: RunFolder, member: Callable[[], Identity] | None = None) -> Sink:
    """Writes a line for each event that somebody may be asked about. member: says who signs, now."""
    log = ChainedLog(folder.path / FILE, member)

    def tell(event: Event) -> None:
        if isinstance(event, KEPT):
            log.write(type(event).__name__, datetime.fromtimestamp(event.at, UTC), **facts_of(event, folder))

    return tell


def facts_of(event: Event, folder: RunFolder) -> dict[str, Any]:
    """What a line says of an event: its fields, and what the journal holds behind it."""
    facts = {key: value for key, value in event.record().items() if key not in ("event", "at")}
    if isinstance(event, Alarm):
        facts["alarm"] = facts.pop("what")  # a line's own `what` is the event's name
    if isinstance(event, RunDone):
        return {"state_sha256": event.result.get("state_sha256", ""), "rounds": event.result.get("rounds", 0)}
    if not isinstance(event, (RoundDone, RunStarted)):
        return facts
    journal = Journal(folder.journal)
    try:
        rows, known, out = journal.rounds(), journal.facts(), absences(journal)
    finally:
        journal.close()
    if isinstance(event, RunStarted):
        of_run = {key: known.get(key, "") for key in ("recipe", "base", "data", "versions")}
        return facts | of_run | {"recipe_as_read": recipe_of(folder).fingerprint}
    last = next((row for row in rows if row.number == event.round), None)
    link = {"state_sha256": last.state_sha256, "link": last.link} if last else {}
    return facts | link | {"absent": sorted(name for name, spans in out.items() if spans[-1][1] is None)}
