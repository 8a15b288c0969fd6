"""The command: python -m tests.regen [--check] [NAME ...]"""

from __future__ import annotations

import argparse
import sys

from tests.regen import GENERATORS, stale, write


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.regen", description="Write the generated files, or check that they are fresh."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    parser.add_argument("names", nargs="*", help=f"only these: {', '.join(GENERATORS)}")
    args = parser.parse_args()
    if odd := set(args.names) - GENERATORS.keys():
        parser.error(f"no generator {', '.join(sorted(odd))}; there are {', '.join(GENERATORS)}")
    files = stale(args.names)
    for path in sorted(files):
        print(f"{'stale' if args.check else 'wrote'} {path}")
    if args.check:
        return 1 if files else 0
    write(files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
