"""fedtune forget | quarantine | rollback: a run without one of its members, from the start or from now on."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.cli.runs import opened
from fedtune.quiet import quiet


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "forget", help="replay a run without a member, as if it had never taken part, and certify it"
    )
    parser.add_argument("run", help="the run's folder, which stays as it is")
    parser.add_argument(
        "--client", action="append", required=True, metavar="NAME", help="who is forgotten; may be repeated"
    )
    parser.add_argument(
        "--to", default="", metavar="DIR", help="the new run's folder; without it RUN-without-NAME"
    )
    parser.add_argument("--keys", metavar="DIR", help="a member's keys, which sign the certificate")
    parser.add_argument("--dry-run", action="store_true", help="say what it costs, and do nothing")
    parser.set_defaults(command=forget)

    parser = commands.add_parser(
        "quarantine", help="leave a member out of a run from the next round on, also while it is running"
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("client", nargs="?", metavar="NAME", help="who; without it, who is left out now")
    parser.add_argument("--why", default="", metavar="TEXT", help="kept in the journal")
    parser.add_argument("--lift", action="store_true", help="let the member take part again")
    parser.set_defaults(command=quarantine)

    parser = commands.add_parser(
        "rollback", help="take the last rounds of a run back, in a new folder that can be resumed"
    )
    parser.add_argument("run", help="the run's folder, which stays as it is")
    parser.add_argument(
        "--to", type=int, required=True, metavar="N", help="the round whose state the new run has"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="a member that is left out from then on; may be repeated",
    )
    parser.add_argument(
        "--as", dest="target", default="", metavar="DIR", help="the new folder; without it RUN-after-N"
    )
    parser.set_defaults(command=rollback)


def forget(options: argparse.Namespace) -> int:
    quiet()
    from fedtune import api
    from fedtune.runtime.forget import plan
    from fedtune.sinks.display import display

    folder = opened(options.run)
    for sentence in plan(folder, options.client).told():
        print(sentence, flush=True)
    if options.dry_run:
        return 0
    keys = options.keys or ""
    with display() as tell:
        done = api.forget(folder.path, options.client, options.to, keys=keys, on_event=tell)
    print(f"{folder.path} still holds what they contributed: remove it where nothing of them may stay")
    print(done.certificate)
    return 0


def quarantine(options: argparse.Namespace) -> int:
    from fedtune.runtime.quarantine import listed, quarantine

    folder = opened(options.run)
    if options.client is None:
        for sentence in listed(folder):
            print(sentence)
        return 0
    print(quarantine(folder, options.client, datetime.now(UTC), options.why, options.lift))
    return 0


def rollback(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.rollback import roll_back
    from fedtune.sinks.display import display

    folder = opened(options.run)
    name = options.target or folder.path.with_name(f"{folder.path.name}-after-{options.to}")
    target = Path(name).expanduser().resolve()
    with display() as tell:
        again = roll_back(folder, options.to, target, datetime.now(UTC), options.without, [tell])
    print(f"{again} rounds were computed again; go on with: fedtune resume {target}")
    return 0
