"""What processes side by side are worth to the local engine: seconds of the rounds of the built-in federation.

one     a process that trains the clients one after the other, with one thread
threads the same with a thread for every core (other bits)
workers a process for every core, with one thread each: the bytes of `one`

python benchmarks/local_workers.py [--repeats 3] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from claims import at_most

from fedtune.threads import available_cores

QUICK = ("rounds=3", "evaluate.base=false", "evaluate.local=false", "evaluate.centralised=false")
TINY = ("rounds=1", *QUICK[1:], "partition.clients=2", "method.train.steps=1", "data.limit=200")
WAYS = {"one": (1, 1), "threads": (1, 0), "workers": (available_cores(), 1)}  # processes, model.threads


def rounds_of(way: str, changes: tuple[str, ...]) -> tuple[float, str]:
    """Seconds of all rounds of a run, the question before the first one included, and its state's hash."""
    workers, threads = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedtune", "simulate", "--runs", folder, "--workers", str(workers)]
        sets = [f"--set={change}" for change in (*changes, f"model.threads={threads}", "name=run")]
        subprocess.run([*command, *sets], check=True, stdout=subprocess.DEVNULL)
        run = Path(folder, "run")
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        result = json.loads((run / "result.json").read_text())
    return sum(event["seconds"] for event in events if event["event"] == "RoundDone"), result["state_sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="alternating; the median counts")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    changes, repeats = (TINY, 1) if options.tiny else (QUICK, options.repeats)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    hashes: dict[str, set[str]] = {way: set() for way in WAYS}
    for _ in range(repeats):
        for way, seconds in taken.items():
            found, sha256 = rounds_of(way, changes)
            seconds.append(found)
            hashes[way].add(sha256)
    for way, seconds in taken.items():
        print(f"{way:<8}{statistics.median(seconds):8.1f} s   ({', '.join(f'{one:.1f}' for one in seconds)})")
    if len(hashes["one"] | hashes["workers"]) != 1:
        raise SystemExit("workers did not end with the bytes of one process")
    one, threads, workers = (statistics.median(taken[way]) for way in ("one", "threads", "workers"))
    print(
        json.dumps(
            [
                at_most(f"{WAYS['workers'][0]} workers against {against}", workers, other, goal)
                for against, other, goal in (
                    ("one process with one thread", one, 1 / 1.7),
                    ("one process with a thread a core", threads, 1.0),
                )
            ]
        )
    )


if __name__ == "__main__":
    main()
