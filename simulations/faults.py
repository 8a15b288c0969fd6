"""A hundred processes killed at random, of every role, while runs go on: same bytes, every update counted
once?

    python simulations/faults.py [--kills 100] [--seed 1] [--rounds 8] [--results FOLDER]

A coordinator and three sites on this machine, over TLS; a run follows the other until so many kills have
happened. Everybody is started again by who
looks after them, the two supervisors by this program (`fedtune resume`, `fedtune client`). Writes
simulations/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

from record import RESULTS, hardware  # noqa: E402

from tests import small, tiny  # noqa: E402
from tests.e2e.deploying import MEMORY, SITES, Deployment, deployed, lines_of, local  # noqa: E402
from tests.e2e.faults.conftest import counts  # noqa: E402
from tests.e2e.faults.crash.roles import processes  # noqa: E402
from tests.e2e.test_flower import journal  # noqa: E402

PAUSE, IMPATIENCE = (
    10.0,
    60.0,
    # seconds at most from a step forward (an update taken, a round committed) to the next kill, and between
    # two
    # kills
)
LONGEST = 1800.0  # seconds of one run, after which it counts as stuck


def kill_one(federation: Deployment, draw: random.Random) -> str:
    """SIGKILL to a random process of a random role; its role."""
    there: dict[str, list[int]] = {}
    for pid, role, _ in processes(str(federation.root)):
        if role and role != "flwr":
            there.setdefault(role, []).append(pid)
    role = draw.choice(sorted(there))
    try:
        os.kill(draw.choice(sorted(there[role])), signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return role


def steps(federation: Deployment, name: str) -> int:
    """How far a run is: updates taken and rounds committed."""
    taken = lines_of(federation.root / "runs" / ".coordinator" / "gate.jsonl")
    return sum(e["event"] == "UpdateAccepted" for e in taken) + sum(
        e["event"] == "RoundDone" for e in federation.events(name)
    )


def mend(federation: Deployment, name: str) -> None:
    """What an init system would do: start again whom nobody else looks after."""
    for site in SITES:
        if federation.running[site].poll() is not None:
            federation.join(site)
    if federation.running["server"].poll() not in (None, 0):
        federation.resume(name)


def one_run(
    federation: Deployment, name: str, recipe: Path, draw: random.Random, left: int, until: float
) -> tuple[list[str], str]:
    """A run with kills all along, `left` at most and none after `until`; the roles that were killed, and what
    went wrong."""
    federation.serve(recipe)
    killed: list[str] = []
    end, again, seen = time.monotonic() + LONGEST, time.monotonic() + IMPATIENCE, steps(federation, name)
    while federation.running["server"].poll() != 0:
        if time.monotonic() > end:
            federation.stacks()
            return killed, f"not through after {LONGEST:.0f} s"
        mend(federation, name)
        if (now := steps(federation, name)) != seen:
            seen, again = now, min(again, time.monotonic() + draw.uniform(0, PAUSE))
        if len(killed) < left and again < time.monotonic() < until and (role := kill_one(federation, draw)):
            killed.append(role)
            print(f"  {time.strftime('%H:%M:%S')} {role}", flush=True)
            again = time.monotonic() + IMPATIENCE
        time.sleep(0.2)
    return killed, ""


def verdict(federation: Deployment, name: str, before: int, alone: Any, result: dict[str, Any]) -> str:
    """What differs from the undisturbed run, "" for nothing."""
    folder = federation.folder(name)
    if folder.read_json("result.json")["state_sha256"] != result["state_sha256"]:
        return "other bytes"
    if journal(folder) != journal(alone):
        return "another journal"
    if counts(federation) - before != result["rounds"] * result["clients"]:
        return f"{counts(federation) - before} receipts"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=1e9, help="kill nobody after so long")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    draw, by_role, mismatches, runs, began = (
        random.Random(options.seed),
        Counter[str](),
        list[dict[str, Any]](),
        0,
        time.monotonic(),
    )
    until, changes = began + 60 * options.minutes, {**MEMORY, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "bert").mkdir()
        model, data = tiny.bert(root / "bert"), small.write_rows(root)
        alone, result = local(root / "local", model, data, **changes)
        with deployed(root / "deployed") as federation:
            federation.join_all()
            while by_role.total() < options.kills and not mismatches and time.monotonic() < until:
                runs, name = runs + 1, f"run-{runs}"
                before = counts(federation) if runs > 1 else 0
                killed, what = one_run(
                    federation,
                    name,
                    federation.recipe(name, model, data, **changes),
                    draw,
                    options.kills - by_role.total(),
                    until,
                )
                by_role.update(killed)
                if what := what or verdict(federation, name, before, alone, result):
                    mismatches.append({"run": name, "what": what})
                print(
                    f"{name}: {len(killed)} kills, {what or 'same bytes, every update once'}; "
                    f"{by_role.total()} kills so far",
                    flush=True,
                )
            if mismatches:
                print(federation.logs())
    record = {
        "kills": by_role.total(),
        "runs": runs,
        "rounds": options.rounds,
        "seed": options.seed,
        "by_role": dict(sorted(by_role.items())),
        "mismatches": mismatches,
        "seconds": round(time.monotonic() - began),
        "hardware": hardware(),
    }
    (options.results / "faults.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
