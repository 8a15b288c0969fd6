"""fedtune forget: a run without one of its members."""

from __future__ import annotations

import argparse
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


def forget(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.forget import plan

    folder = opened(options.run)
    for sentence in plan(folder, options.client).told():
        print(sentence, flush=True)
    if options.dry_run:
        return 0
    from fedtune import api
    from fedtune.sinks.console import console_sink

    keys = options.keys or ""
    done = api.forget(folder.path, options.client, options.to, keys=keys, on_event=console_sink)
    print(f"{folder.path} still holds what they contributed: remove it where nothing of them may stay")
    print(done.certificate)
    return 0
