"""fedtune keys: who belongs to a federation, and the keys by which it is known."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError

DAYS = 365
WEEKS = 42  # days of keys that are renewed by themselves


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "keys", help="make, renew and revoke the keys of a federation's members", description=__doc__
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    action = actions.add_parser("init", help="make a private authority and the coordinator's keys")
    action.add_argument(
        "--federation", default="federation", metavar="NAME", help="its name (default: federation)"
    )
    action.add_argument(
        "--host",
        action="append",
        default=[],
        help="a host name or address that clients use for the coordinator; may be repeated",
    )
    action.add_argument(
        "--authority-passphrase",
        action="store_true",
        help="encrypt the authority's key; prompted for, or taken from FEDTUNE_AUTHORITY_PASSPHRASE",
    )
    add_made(action)
    action.set_defaults(command=init)

    action = actions.add_parser("issue", help="make the keys of a new client")
    action.add_argument("name", help="the client's name")
    add_made(action)
    action.set_defaults(command=issue)

    action = actions.add_parser(
        "request",
        help="at a site: make its keys, which never leave it, and a request for the operator",
    )
    action.add_argument("name", help="the site's name, as the operator knows it")
    action.add_argument(
        "--federation",
        default="federation",
        metavar="NAME",
        help="the federation's name (default: federation)",
    )
    action.add_argument("--to", default="", metavar="DIR", help="the folder of the keys (default: the name)")
    action.add_argument(
        "--passphrase",
        action="store_true",
        help="encrypt the keys; prompted for, or FEDTUNE_PASSPHRASE",
    )
    action.set_defaults(command=request)

    action = actions.add_parser(
        "sign",
        help="for the operator: sign a site's request; the answer is useless without the site's keys",
    )
    action.add_argument("request", help="the file that fedtune keys request made")
    action.add_argument(
        "--days", type=days, default=DAYS, help=f"how long the keys are valid (default: {DAYS})"
    )
    add_folder(action)
    action.set_defaults(command=sign)

    action = actions.add_parser("accept", help="at a site: install the operator's answer to its request")
    action.add_argument("answer", help="the file that fedtune keys sign made")
    action.add_argument(
        "--to", required=True, metavar="DIR", help="the folder of the keys that were requested"
    )
    action.set_defaults(command=accept)

    action = actions.add_parser(
        "renew", help="make new keys for a member; the old ones stay valid until they expire or are revoked"
    )
    action.add_argument("name", help="a client's name, or coordinator")
    action.add_argument(
        "--host",
        action="append",
        default=[],
        help="for the coordinator: its names and addresses from now on (default: unchanged)",
    )
    add_made(action)
    action.set_defaults(command=renew)

    action = actions.add_parser(
        "revoke", help="remove a member's keys from the allow list; a running coordinator obeys at once"
    )
    action.add_argument("name", help="the member's name")
    action.add_argument(
        "--key",
        default="",
        metavar="HASH",
        help="only the key whose hash starts so; see fedtune keys list",
    )
    add_folder(action)
    action.set_defaults(command=revoke)

    action = actions.add_parser(
        "publish",
        help="sign the list of members again: after a revocation, or before the current one expires",
    )
    action.add_argument("--days", type=days, default=DAYS, help=f"how long it is valid (default: {DAYS})")
    action.add_argument(
        "--recipe",
        action="append",
        metavar="FILE",
        help="the only recipes that sites may run from now on (TOML, or their whole hash); may be repeated; "
        "all: every one (default: as before)",
    )
    add_folder(action)
    action.set_defaults(command=publish)

    action = actions.add_parser(
        "renewals",
        help="where the authority is, by a timer: sign the requests of sites whose keys end soon, and renew "
        "the coordinator's",
    )
    action.add_argument(
        "--at",
        required=True,
        metavar="DIR",
        help="the coordinator's folder of requests: RUNS/.coordinator/renewals, or a copy of it",
    )
    action.add_argument(
        "--days", type=days, default=WEEKS, help=f"how long the new keys are valid (default: {WEEKS})"
    )
    add_folder(action)
    action.set_defaults(command=renewals)

    action = actions.add_parser("list", help="list all issued keys, and when they expire")
    add_folder(action)
    action.set_defaults(command=listed)


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", default="keys", metavar="DIR", help="the folder of keys (default: keys)")


def add_made(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument(
        "--days", type=days, default=DAYS, help=f"how long the new keys are valid (default: {DAYS})"
    )
    parser.add_argument(
        "--passphrase",
        action="store_true",
        help="encrypt the member's new keys; prompted for, or taken from FEDTUNE_PASSPHRASE",
    )


def days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected 1 to 3650 days")
    return int(text)


def init(options: argparse.Namespace) -> int:
    from fedtune.trust import authority

    folder = Path(options.keys).expanduser()
    hosts = options.host or ["localhost", "127.0.0.1", socket.gethostname()]
    own = chosen(folder / "authority" / "key.pem", options.authority_passphrase)
    made = authority.create(
        folder,
        options.federation,
        hosts,
        options.days,
        own,
        chosen(folder / "coordinator" / "key.pem", options.passphrase),
    )
    print(f"authority    {folder / 'authority'}  keep it offline: whoever has it can name new members")
    print(f"coordinator  {made.place('coordinator')}  reached as {', '.join(hosts)}")
    print(f"next         fedtune keys issue NAME --keys {folder}")
    return 0


def issue(options: argparse.Namespace) -> int:
    from fedtune.trust.authority import open_authority

    made = open_authority(Path(options.keys).expanduser(), asked)
    place = made.issue(
        options.name, options.days, chosen(made.place(options.name) / "key.pem", options.passphrase)
    )
    print(f"{place}  carry it to the site over a safe way, then delete it here")
    return 0


def request(options: argparse.Namespace) -> int:
    from fedtune.trust import requests

    folder = Path(options.to or options.name).expanduser()
    path, mark = requests.make(
        folder, options.federation, options.name, chosen(folder / "key.pem", options.passphrase)
    )
    print(f"{path}  carry it to the operator (fedtune keys sign); the keys stay in {folder}")
    print(
        f"fingerprint  {mark}  read it to the operator over another way: whoever changes the request on its "
        "way changes it"
    )
    return 0


def sign(options: argparse.Namespace) -> int:
    from fedtune.trust import requests
    from fedtune.trust.authority import open_authority

    path = Path(options.request).expanduser()
    content = requests.content_of(path)
    made = open_authority(Path(options.keys).expanduser(), asked)
    print(
        f"fingerprint  {requests.mark(content)}  compare it with what the site says before its answer is used"
    )
    name, answer = made.sign(content, options.days)
    target = path.with_name(f"{name}.answer")
    target.write_bytes(answer)
    print(f"{target}  carry it back to '{name}' (fedtune keys accept); it is no secret")
    return 0


def accept(options: argparse.Namespace) -> int:
    from fedtune.trust import requests

    folder = Path(options.to).expanduser()
    identity = requests.accept(folder, requests.content_of(Path(options.answer).expanduser()), asked)
    print(
        f"{folder}  keys of '{identity.name.name}' of '{identity.name.federation}', valid until "
        f"{identity.peer.ends:%Y-%m-%d}"
    )
    return 0


def renew(options: argparse.Namespace) -> int:
    from fedtune.trust.authority import open_authority

    made = open_authority(Path(options.keys).expanduser(), asked)
    place = made.renew(
        options.name,
        options.days,
        chosen(made.place(options.name) / "key.pem", options.passphrase),
        options.host,
    )
    print(
        f"{place}  the old keys stay valid until they end, or: fedtune keys revoke {options.name} --key HASH"
    )
    return 0


def revoke(options: argparse.Namespace) -> int:
    from fedtune.trust import authority

    folder = Path(options.keys).expanduser()
    for entry in authority.revoke(coordinator(folder), options.name, options.key):
        print(f"revoked {entry.name} {entry.key[:12]}")
    if (folder / "authority").exists():
        return publish(options)
    print(
        "sites learn of it from the authority: fedtune keys publish, and copy coordinator/members.signed here"
    )
    return 0


def publish(options: argparse.Namespace) -> int:
    from fedtune.trust.authority import open_authority

    made = open_authority(Path(options.keys).expanduser(), asked)
    given: list[str] | None = vars(options).get("recipe")
    recipes = None if given is None else [fingerprint_of(text) for text in given if text != "all"]
    version = made.publish(vars(options).get("days", DAYS), recipes=recipes)
    print(f"version {version} of the list of members is signed; the coordinator gives it to the sites")
    return 0


def fingerprint_of(text: str) -> str:
    """Of a recipe's file, or the hash itself. Raises C101 to C105."""
    from fedtune.config import read
    from fedtune.forms import Sha256

    return text if Sha256.form.fullmatch(text) else read(text, []).fingerprint


def renewals(options: argparse.Namespace) -> int:
    from fedtune.trust import renewal
    from fedtune.trust.authority import open_authority
    from fedtune.trust.identity import from_environment

    made = open_authority(Path(options.keys).expanduser(), asked)
    for line in renewal.answered(made, Path(options.at).expanduser(), options.days):
        print(line)
    place = made.place("coordinator")
    if renewal.ends_soon(place):
        made.renew("coordinator", options.days, from_environment(place / "key.pem"))
        print(f"{place}: the coordinator's keys were renewed; where it runs elsewhere, copy the folder")
    return 0


def listed(options: argparse.Namespace) -> int:
    """One line a key."""
    from fedtune.trust.allowed import read_entries
    from fedtune.trust.certificates import utc_now

    print(f"{'name':<24}{'key':<14}{'from':<12}{'until':<12}state")
    now = utc_now()
    for entry in read_entries(coordinator(Path(options.keys).expanduser()) / "allowed.json"):
        state = entry.state(now)
        if state == "valid":
            state = f"valid for {(datetime.fromisoformat(entry.ends) - now).days} days"
        print(f"{entry.name:<24}{entry.key[:12]:<14}{entry.starts[:10]:<12}{entry.ends[:10]:<12}{state}")
    return 0


def coordinator(folder: Path) -> Path:
    """The coordinator's folder: inside an operator's folder, or by itself, as it is carried to the
    coordinator's machine."""
    return folder if (folder / "allowed.json").exists() else folder / "coordinator"


def asked(path: Path) -> str | None:
    """The passphrase of an encrypted key: from the environment, or from whoever sits at the terminal."""
    from fedtune.trust.identity import from_environment

    return from_environment(path) or (
        getpass.getpass(f"passphrase of {path}: ") if sys.stdin.isatty() else None
    )


def chosen(path: Path, wanted: bool) -> str | None:
    """A passphrase for a key that is about to be made. Raises T703."""
    from fedtune.trust.identity import variable_of

    if not wanted:
        return None
    if given := os.environ.get(variable_of(path)):
        return given
    if not sys.stdin.isatty():
        raise FedtuneError(
            "T703",
            f"no passphrase for '{path}'",
            "one to encrypt it with",
            f"set {variable_of(path)}, or run this in a terminal",
        )
    first = getpass.getpass(f"new passphrase of {path}: ")
    if not first or first != getpass.getpass("the same again: "):
        raise FedtuneError(
            "T703", "two passphrases that differ or are empty", "the same one twice", "run it again"
        )
    return first
