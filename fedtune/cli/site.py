"""fedtune site: what a site's operator sees of its own site. Reads only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.plain import plain


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "site", help="at a site: what has left it, and the receipts for that", description=__doc__
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = actions.add_parser("status", help="rounds, rows, bytes and hashes of what has left")
    add_home(action)
    action.set_defaults(command=status)
    action = actions.add_parser(
        "receipts", help="read and verify the coordinator's signed receipts; exit code 2 where one is false"
    )
    add_home(action)
    action.add_argument(
        "--keys", required=True, metavar="DIR", help="this site's keys: the authority's certificate"
    )
    action.set_defaults(command=receipts)


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home",
        default="site",
        metavar="DIR",
        help="the site's home, as fedtune client has it (default: site)",
    )


def home_of(options: argparse.Namespace) -> Path:
    home = Path(options.home).expanduser()
    if not home.is_dir():
        raise FedtuneError(
            "C105", f"no folder '{home}'", "a site's home", "give --home as fedtune client has it"
        )
    return home


def status(options: argparse.Namespace) -> int:
    from fedtune.deploy import site_books

    for line in site_books.status(home_of(options)):
        print(plain(line))
    return 0


def receipts(options: argparse.Namespace) -> int:
    from fedtune.deploy import site_books
    from fedtune.trust import private
    from fedtune.trust.certificates import read_certificate
    from fedtune.trust.identity import AUTHORITY

    path = Path(options.keys).expanduser() / AUTHORITY
    authority = read_certificate(private.read_public(path), f"'{path}'")
    for line in site_books.proven(home_of(options), authority):
        print(plain(line))
    return 0
