"""What waiting threads cost: one run alone and two at once, with fedtune's short wait and with OpenMP's own
long one.

alone   the built-in federation without scores and comparisons, two local processes never at once: ours
        against OpenMP's default wait
pair    two such runs at once, against one of them alone

python benchmarks/threads.py [--full | --tiny]       # --full: three rounds as simulated by a user, and
OpenMP's default in pairs too (minutes)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from claims import at_most

SHORT: dict[str, str] = {}  # fedtune's own choice
LONG = {"GOMP_SPINCOUNT": "300000"}  # GNU OpenMP's default where OMP_WAIT_POLICY is not set
QUICK = (
    "rounds=1",
    "model.threads=0",
    "evaluate.base=false",
    "evaluate.local=false",
    "evaluate.centralised=false",
)
FULL = ("rounds=3", "model.threads=0")
TINY = (*QUICK, "partition.clients=2", "method.train.steps=1", "data.limit=200")


def start(wait: dict[str, str], changes: tuple[str, ...], folder: str) -> subprocess.Popen[bytes]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    command = [
        sys.executable,
        "-m",
        "fedtune",
        "simulate",
        "--runs",
        folder,
        *(word for change in changes for word in ("--set", change)),
    ]
    return subprocess.Popen(command, env=clean | wait, stdout=subprocess.DEVNULL)


def seconds(wait: dict[str, str], changes: tuple[str, ...], at_once: int) -> float:
    """Wall clock of runs that begin together, until the last one has ended."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        codes = [
            run.wait() for run in [start(wait, changes, f"{folder}/{number}") for number in range(at_once)]
        ]
        if any(codes):
            raise SystemExit(f"a run ended with {codes}")
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    changes, repeats = (FULL, 3) if options.full else (TINY if options.tiny else QUICK, 1)
    taken: dict[str, list[float]] = {"short, alone": [], "long, alone": [], "short, pair": []}
    if not options.tiny:
        seconds(SHORT, QUICK, 1)  # files and compiled kernels are read once before anything is timed
    for _ in range(repeats):
        taken["short, alone"].append(seconds(SHORT, changes, 1))
        taken["long, alone"].append(seconds(LONG, changes, 1))
        taken["short, pair"].append(seconds(SHORT, changes, 2))
    if options.full:
        taken["long, pair"] = [seconds(LONG, changes, 2)]
    for name, values in taken.items():
        print(
            f"{name:<14}{statistics.median(values):8.1f} s   "
            f"({', '.join(f'{value:.1f}' for value in values)})"
        )
    short, long, pair = (
        statistics.median(taken[name]) for name in ("short, alone", "long, alone", "short, pair")
    )
    claims = [
        ("a run alone, against OpenMP's default wait", short, long, 1.05),
        ("two runs at once, against one alone", pair, short, 2.2),
    ]
    print(json.dumps([at_most(*one) for one in claims]))


if __name__ == "__main__":
    main()
