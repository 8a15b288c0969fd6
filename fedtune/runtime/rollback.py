"""A run as it was after an earlier round, in a new folder: to go on from there without who did harm since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.runtime.folder import RunFolder, recipe_of, taken
from fedtune.runtime.quarantine import absent_until, quarantine
from fedtune.runtime.replay import Record, begin, compare, deployed, members, stored
from fedtune.runtime.run import run
from fedtune.sinks import sink_of


def roll_back(
    folder: RunFolder,
    number: int,
    target: Path,
    now: datetime,
    out: Sequence[str] = (),
    tell: Sequence[Callable[[Event], None]] = (),
) -> int:
    """The run as it was after round `number`, in a new folder, to be resumed there; returns how many rounds
    had to be computed again, because their states are not kept.

    out   members that are in quarantine from the next round on
    tell  who is told the new run's events, beside its folder

    Raises C103 for a round or a member that the run does not have, C104 for a deployed run, R401, R402, R403,
    R406, R421. The old run is left as it is.
    """
    record, recipe = Record.of(folder), recipe_of(folder)
    if not 0 <= number < len(record.rounds):
        raise FedtuneError(
            "C103", f"round {number}", f"0 to {len(record.rounds) - 1} of this run", "correct --to"
        )
    if deployed(folder):
        raise FedtuneError(
            "C104",
            "a run on real sites, which remember the rounds that they answered",
            "a run whose clients are all on this machine",
            "export an earlier model and start a new run with method.start_from",
        )
    if target.exists():
        raise taken(target)
    federation, kept, new = members(recipe, folder, record), stored(folder, record, number), RunFolder(target)
    left = federation.without(recipe.sampling.without)
    if unknown := [name for name in out if name not in {one.name for one in left.clients}]:
        raise FedtuneError("C103", f"client '{unknown[0]}'", "a client of the run", "correct the name")
    begin(new, folder, record, kept, recipe, left)
    if kept < number:
        run(recipe, new, sink_of(target, recipe.sinks, *tell), until=number)
        compare(record, Record.of(new), range(kept + 1, number + 1))
    absent_until(new, number)
    for name in out:
        quarantine(new, name, now, f"rolled back to round {number} of {folder.path.name}")
    return number - kept
