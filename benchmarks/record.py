"""Run benchmarks one after the other on a quiet machine and keep their claims:
simulations/results/benchmarks.json, with hardware and month.

python benchmarks/record.py [NAME ...] [--tiny] [--out FILE]      # codec aggregate deployment exchange split
threads zeroth_replay zeroth_step; default: all of these
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("codec", "aggregate", "deployment", "exchange", "split", "threads", "zeroth_replay", "zeroth_step")
KEPT = HERE.parent / "simulations" / "results" / "benchmarks.json"


def claims(name: str, *more: str) -> list[dict[str, object]]:
    """What a benchmark's last line says."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *more],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return said if isinstance(said, list) else [said]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME")
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest sizes: shows that the scripts run; give --out, too"
    )
    parser.add_argument("--out", type=Path, default=KEPT)
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    for name in options.names or NAMES:
        load = os.getloadavg()[0]
        hardware = (
            f"{model}, {len(os.sched_getaffinity(0))} cores, CPU only, {time.strftime('%B %Y')}, load "
            f"{load:.1f} before"
        )
        known[name] = {
            "command": f"python benchmarks/{name}.py",
            "hardware": hardware,
            "claims": claims(name, *(["--tiny"] if options.tiny else [])),
        }
        options.out.write_text(json.dumps(known, indent=1) + "\n")
        print(name, json.dumps(known[name]["claims"]))


if __name__ == "__main__":
    main()
