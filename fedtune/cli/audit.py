"""fedtune audit verify | report: what happened in a run, for somebody who was not there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedtune.cli.runs import opened


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("audit", help="check an audit log, or write a page about a run")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = actions.add_parser(
        "verify",
        help="check the log of a run's folder or a site's home; names the first bad line",
    )
    action.add_argument("folder", metavar="DIR", help="where audit.jsonl is")
    action.add_argument(
        "--keys", metavar="DIR", help="a member's keys: the authority's certificate, which signers must have"
    )
    action.set_defaults(command=verify)
    action = actions.add_parser(
        "report", help="who took part, what left each site, by which steps it was covered, what was refused"
    )
    action.add_argument("run", help="the run's folder")
    action.add_argument("--to", metavar="FILE", help="a .md file; without it, the page is printed")
    action.set_defaults(command=report)


def verify(options: argparse.Namespace) -> int:
    from fedtune.trust import private
    from fedtune.trust.certificates import read_certificate
    from fedtune.trust.chained_log import FILE
    from fedtune.trust.chained_log import verify as check
    from fedtune.trust.identity import AUTHORITY

    authority = None
    if options.keys:
        path = Path(options.keys).expanduser() / AUTHORITY
        authority = read_certificate(private.read_public(path), f"'{path}'")
    found = check(Path(options.folder).expanduser() / FILE, authority)
    signed = f"signed by {found.signer}" if found.signer else "not signed"
    print(f"{found.lines} lines in order, {signed}; the last one's hash is {found.last}")
    return 0


def report(options: argparse.Namespace) -> int:
    from fedtune.disk import write_atomic
    from fedtune.report.audit import audit_report

    page = audit_report(opened(options.run))
    if options.to:
        write_atomic(Path(options.to).expanduser(), page.encode())
    print(options.to or page)
    return 0
