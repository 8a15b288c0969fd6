"""fedtune status: how far a run is, from its folder or from another machine. Reads only."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedtune.deploy.coordinator_run import FAILED, Deployed
from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.runtime.folder import RunFolder, existing, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.sinks.console import size
from fedtune.trust import load
from fedtune.wire.v1 import exchange_pb2 as pb


def status_of(folder: RunFolder, name: str) -> pb.RunStatus:
    """A run by its journal. Raises R402, R403."""
    recipe = recipe_of(folder)
    status = pb.RunStatus(run=name, rounds=recipe.rounds, finished=(folder.path / "result.json").exists())
    if not folder.journal.exists():  # it has not begun
        return status
    journal = Journal(folder.journal)
    try:
        seconds, answers = (
            [row.seconds for row in journal.rounds()],
            [answer for _, answer in journal.answers()],
        )
        status.seconds = (journal.phase("clock") or {}).get("seconds", 0.0)
    finally:
        journal.close()
    status.committed, status.round_seconds = len(seconds), statistics.median(seconds) if seconds else 0.0
    status.up_bytes, status.down_bytes = sum(a.up_bytes for a in answers), sum(a.down_bytes for a in answers)
    return status


def statuses(runs: Path) -> Iterator[pb.RunStatus]:
    """All deployed runs under a folder, under their names on the exchange; one that cannot be read is left
    out."""
    for path in sorted(runs.glob("*/deploy.json")):
        folder = RunFolder(path.parent)
        with contextlib.suppress(FedtuneError, OSError, TypeError):
            yield status_of(folder, Deployed.read(folder).run)


class Ends:
    """Which runs under a folder have ended since this was made, for their members. Looks at most once a
    second."""

    def __init__(self, runs: Path, is_member: Callable[[str, str], bool]) -> None:
        self.runs, self.is_member = runs, is_member
        self.before, self.now, self.looked = set(ended(runs)), dict[str, str](), time.monotonic()

    def __call__(self, member: str) -> list[str]:
        if time.monotonic() > self.looked + 1.0:
            self.looked = time.monotonic()
            self.now = {run: how for run, how in ended(self.runs).items() if run not in self.before}
        return [f"run {run} has ended {how}" for run, how in self.now.items() if self.is_member(run, member)]


def ended(runs: Path) -> dict[str, str]:
    """Deployed runs under a folder that are over, by their names on the exchange, and how they ended."""
    over = {}
    for path in runs.glob("*/deploy.json"):
        how = (
            "with a result"
            if (path.parent / "result.json").exists()
            else "without a result"
            if (path.parent / FAILED).exists()
            else ""
        )
        if how:
            with contextlib.suppress(FedtuneError, TypeError):
                over[Deployed.read(RunFolder(path.parent)).run] = how
    return over


def told(status: pb.RunStatus, name: str) -> Iterator[str]:
    """Two lines a run."""
    left = status.round_seconds * (status.rounds - status.committed)
    ahead = (
        "finished"
        if status.finished
        else f"about {left:.0f} s left"
        if status.committed
        else "no round committed yet"
    )
    yield f"{name}: round {status.committed} of {status.rounds}, {ahead}"
    yield (
        f"  up {size(status.up_bytes)}, down {size(status.down_bytes)}, {status.seconds:.0f} s of work, "
        f"{status.round_seconds:.1f} s a round (median)"
    )


def of_folder(path: str) -> Iterator[str]:
    """A run on this machine."""
    folder = existing(path)
    return told(status_of(folder, folder.path.name), folder.path.resolve().name)


def at_server(address: str, keys: Path, run: str) -> Iterator[str]:
    """What the coordinator says to this member of the runs that it belongs to. Raises E801, E802, E806, T701
    to T706."""
    identity = load(keys)
    with tempfile.TemporaryDirectory() as folder:
        client = ExchangeClient(address, identity, Path(folder), patience=5.0)
        try:
            reply = client.status()
        finally:
            client.close()
    known = {short(status.run): status for status in reply.runs}
    if run and run not in known:
        raise FedtuneError(
            "E806",
            f"run '{run}'",
            f"one of {', '.join(known) or 'none yet'}",
            "list all runs with: fedtune status --server HOST:PORT",
        )
    who = f" ({', '.join(reply.names)})" if reply.names else ""
    clock = reply.now - time.time()
    yield (
        f"{address}: {reply.present} members present{who}, {reply.uploads} uploads under way, "
        f"{size(reply.free_bytes)} free, clock {clock:+.1f} s"
    )
    for name, status in known.items():
        if run in ("", name):
            yield from told(status, name)
            rounds = [r for r in reply.rounds if r.run == status.run]
            newest = max((r.round for r in rounds), default=0)
            yield from (
                f"  round {r.round} '{r.verb}': {r.accepted} of {r.asked} updates, {size(r.bytes)}"
                for r in rounds
                if r.round == newest and r.open
            )


def short(run: str) -> str:
    """The name that people know, of a run's name on the exchange."""
    return run.rpartition("-")[0] or run
