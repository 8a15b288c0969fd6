"""The command: python -m tests.models [--write] [FAMILY ...]"""

from __future__ import annotations

import argparse
import sys

from tests.models.record import FAULT, held, store, tried_all


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.models",
        description="Try families of models; store what came out (outcomes.json).",
    )
    parser.add_argument(
        "--dry", action="store_true", help="store nothing; print what differs from what is stored"
    )
    parser.add_argument("families", nargs="*", help="only these")
    args = parser.parse_args()
    faults = 0
    stored = held()
    for name, rows in tried_all(args.families):
        for task, row in rows.items():
            for column, outcome in row.items():
                faults += outcome.startswith(FAULT)
                if outcome.startswith(FAULT) or outcome != stored.get(name, {}).get(task, {}).get(column):
                    print(f"{name} / {task} / {column}: {outcome}", flush=True)
        if not args.dry:
            store(name, rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
