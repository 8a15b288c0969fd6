"""fedtune status: how far a run is, from its folder or from another machine. Reads only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.runtime.folder import existing, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.sinks.console import size
from fedtune.trust import load


def of_folder(path: str) -> Iterator[str]:
    """Committed rounds, answers, bytes and the time that is left, from the journal."""
    folder = existing(path)
    recipe = recipe_of(folder)
    journal = Journal(folder.journal)
    try:
        rounds, answers = journal.rounds(), [answer for _, answer in journal.answers()]
        clock = journal.phase("clock") or {}
    finally:
        journal.close()
    done, seconds = len(rounds), [r.seconds for r in rounds]
    yield f"{folder.path.name}: round {done} of {recipe.rounds}, {recipe.method.type}" + (", finished" if (folder.path / "result.json").exists() else "")
    counted = sum(answer.outcome == "ok" for answer in answers)
    up, down = sum(a.up_bytes for a in answers), sum(a.down_bytes for a in answers)
    yield f"  {counted} answers counted, {len(answers) - counted} left out; up {size(up)}, down {size(down)}; {clock.get('seconds', 0.0):.0f} s"
    if done and done < recipe.rounds:
        left = sorted(seconds)[len(seconds) // 2] * (recipe.rounds - done)
        yield f"  about {left:.0f} s left, at the median of {done} rounds"


def at_server(address: str, keys: Path, run: str) -> Iterator[str]:
    """What the coordinator's exchange says to this member: the rounds of the runs that it belongs to. Raises E801, E802, T701 to T706."""
    import tempfile

    identity = load(keys)
    with tempfile.TemporaryDirectory() as folder:
        client = ExchangeClient(address, identity, Path(folder), patience=5.0)
        try:
            reply = client.status()
        finally:
            client.close()
    rounds = [r for r in reply.rounds if not run or r.run == run or r.run.rpartition("-")[0] == run]
    if run and not rounds:
        raise FedtuneError("E806", f"run '{run}'", "a run that this member belongs to and that has begun", "see: fedtune status --server ... without a run")
    runs, clock = len({r.run for r in rounds}), reply.now - time.time()
    yield f"{address}: {runs} runs, {reply.uploads} uploads under way, {size(reply.free_bytes)} free, clock {clock:+.1f} s"
    newest: dict[str, int] = {}
    for r in rounds:
        if newest.setdefault(r.run, r.round) == r.round:
            state = "open" if r.open else "closed"
            yield f"  {r.run.rpartition('-')[0]}: round {r.round} '{r.verb}' {state}, {r.accepted} of {r.asked} updates, {size(r.bytes)}"
