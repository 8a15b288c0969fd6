"""fedtune server | client | status: a federation of real machines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.cli.common import add_recipe
from fedtune.cli.showing import add_showing, shown
from fedtune.errors import FedtuneError
from fedtune.events import Event, Said, event_of
from fedtune.extras import require
from fedtune.plain import plain
from fedtune.quiet import quiet

if TYPE_CHECKING:
    from fedtune.config import Recipe
    from fedtune.runtime.folder import RunFolder

PORT = 9443


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "server", help="coordinate real clients: the same recipe, on other people's machines"
    )
    parser.add_argument(
        "recipe",
        nargs="*",
        help="recipes (TOML), one run each, all at the same time; without one, the built-in federation",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one value of every recipe, e.g. --set rounds=3",
    )
    parser.add_argument(
        "--keys",
        default="keys",
        metavar="DIR",
        help="the coordinator's keys (default: keys, see fedtune keys init)",
    )
    parser.add_argument(
        "--listen",
        default=f"0.0.0.0:{PORT}",
        metavar="HOST:PORT",
        help=f"where clients connect to (default: 0.0.0.0:{PORT})",
    )
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)"
    )
    parser.add_argument("--metrics", default="", metavar="HOST:PORT", help="a Prometheus endpoint")
    parser.add_argument(
        "--connections",
        type=int,
        default=256,
        metavar="N",
        help="of one address at once; a site needs three (default: 256)",
    )
    add_showing(parser)
    parser.set_defaults(command=server)

    parser = commands.add_parser("client", help="join a federation with this site's data")
    parser.add_argument("--server", default="", metavar="HOST:PORT", help="the coordinator")
    parser.add_argument("--data", default="", metavar="FILE", help="this site's rows")
    parser.add_argument(
        "--shared",
        default="",
        metavar="FILE",
        help="this site's copy of the rows that all sites mix into their own, where a recipe has data.share",
    )
    parser.add_argument(
        "--map",
        default="",
        metavar="NAME=COLUMN,...",
        help="the recipe's names for this site's columns; a recipe can then read no other column",
    )
    parser.add_argument(
        "--partition",
        action="store_true",
        help="demos only: recipes may say which rows and which model are read on this machine",
    )
    parser.add_argument(
        "--keys",
        default="",
        metavar="DIR",
        help="this site's keys, as the coordinator's operator issued them",
    )
    parser.add_argument(
        "--home",
        default="site",
        metavar="DIR",
        help="where this site keeps its work (default: site)",
    )
    parser.add_argument(
        "--model", default="", metavar="NAME", help="the base model's folder here, instead of the recipe's"
    )
    parser.add_argument("--device", default="", help="the device, instead of the recipe's: cpu, cuda, cuda:1")
    parser.add_argument(
        "--load",
        default="",
        choices=("full", "8bit", "4bit", "auto"),
        help="in how many bits the base is held here, instead of the recipe's model.load",
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="the type of the base's numbers here, instead of the recipe's model.dtype",
    )
    parser.add_argument(
        "--trainer",
        default="",
        metavar="FILE",
        help="a script of yours with a Hugging Face Trainer, which trains in the place of fedtune's own loop "
        "(docs/trainer.md)",
    )
    parser.add_argument(
        "--policy", default="", metavar="FILE", help="what this site allows (TOML, see docs/deployment.md)"
    )
    parser.add_argument(
        "--cache-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help="of states that are kept, so that they need not be sent again, and of rows kept as tokens "
        "(default: 4; 0: neither)",
    )
    parser.add_argument(
        "--keep-days",
        type=int,
        default=0,
        metavar="N",
        help="for how long receipts and the ledger are kept (default: for good)",
    )
    parser.add_argument(
        "--check",
        nargs="?",
        const="",
        default=None,
        metavar="RECIPE",
        help="do not join: report what would keep this site out, in general and for this RECIPE",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="with --check RECIPE: change one value of it",
    )
    add_showing(parser)
    parser.add_argument(
        "--explain",
        default="",
        metavar="TICKET|RECIPE",
        help="do not join: say in words what would leave this site, and what --policy does to it",
    )
    parser.set_defaults(command=client)

    parser = commands.add_parser(
        "approve", help="at a site: allow a recipe, if its policy accepts approved recipes only"
    )
    add_recipe(parser)
    parser.add_argument(
        "--home",
        default="site",
        metavar="DIR",
        help="the site's home, as given to fedtune client (default: site)",
    )
    parser.add_argument("--show", action="store_true", help="only say in words what the recipe does")
    parser.set_defaults(command=approve)

    parser = commands.add_parser("status", help="a run's rounds, bytes and time, here or at a coordinator")
    parser.add_argument(
        "run",
        nargs="?",
        default="",
        help="a run's folder; or with --server, the name of a run there (default: all)",
    )
    parser.add_argument("--server", default="", metavar="HOST:PORT", help="ask this coordinator")
    parser.add_argument(
        "--keys", default="", metavar="DIR", help="with --server: a member's keys, or the coordinator's"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="go on until the run has ended, or Ctrl-C; at a terminal, in place",
    )
    parser.set_defaults(command=status)


def server(options: argparse.Namespace) -> int:
    """Begin or go on with the recipes' runs, until all have ended."""
    from fedtune.config import read

    require("flwr", "flower", "fedtune server", "F501")

    recipes = [
        (read(path, options.set), Path(path).stem if path else "demo") for path in options.recipe or [None]
    ]
    quiet()
    connections = max(3, options.connections)
    with shown(options, live=len(recipes) == 1) as tell:
        return coordinate(
            recipes, options.runs, options.keys, options.listen, options.metrics, tell, connections
        )


def coordinate(
    recipes: Sequence[tuple[Recipe, str]],
    runs: str,
    keys: str,
    listen: str,
    metrics: str,
    tell: Callable[[Event], None],
    connections: int = 256,
) -> int:
    """Begin or go on with runs, and look after everything until they have ended. Recipes come with the names
    that their runs get otherwise; `tell` is told what the runs' processes say."""
    from fedtune.cli.keys import coordinator as own
    from fedtune.deploy.ports import require_free
    from fedtune.deploy.server import (
        HOME,
        Coordinator,
        begin,
        conduct_all,
        require_coordinator,
        require_new_ready,
    )
    from fedtune.deploy.supervisor import Stopped, require_idle, stop_on_signals

    place, folder = Path(runs).expanduser().resolve(), own(Path(keys).expanduser()).resolve()
    require_coordinator(folder)
    require_idle(place / HOME)
    require_free({"--listen": listen} | ({"--metrics": metrics} if metrics else {}))
    for recipe, stem in recipes:
        require_new_ready(recipe, stem, place, folder)
    begun = [begin(recipe, stem, place, folder, listen, metrics, connections) for recipe, stem in recipes]
    stop_on_signals()
    try:
        return conduct_all(
            begun, Coordinator(folder, place, listen, metrics, said_by(tell), connections=connections)
        )
    except Stopped:
        for run in begun:
            tell(Said(f"stopped; go on with: fedtune resume {run.path}"))
        return 0


def go_on(folder: RunFolder, options: argparse.Namespace) -> int:
    """`fedtune resume` of a run on real sites: with the keys and at the address that it began with."""
    from fedtune.deploy.coordinator_run import Deployed
    from fedtune.runtime.folder import recipe_of

    where = Deployed.read(folder)
    with shown(options) as tell:
        return coordinate(
            [(recipe_of(folder), folder.path.name)],
            str(folder.path.parent),
            where.keys,
            where.address,
            where.metrics,
            tell,
            where.connections,
        )


def said_by(tell: Callable[[Event], None]) -> Callable[[Mapping[str, Any]], None]:
    """Records of a run's process, told as events; so is why a run has ended, which even who wants quiet is
    told."""

    def show(record: Mapping[str, Any]) -> None:
        if record.get("event") == "Ended":
            tell(Said(f"fedtune: {record['text']}"))
        elif event := event_of(record):
            tell(event)

    return show


def client(options: argparse.Namespace) -> int:
    """Take part until ended by Ctrl-C or SIGTERM."""
    if options.explain:
        from fedtune.deploy.explain import explained
        from fedtune.deploy.policy import read_policy

        for line in explained(options.explain, read_policy(options.policy), Path(options.home).expanduser()):
            print(plain(line), flush=True)
        return 0
    for option in ("server", "keys"):
        if not getattr(options, option):
            raise FedtuneError(
                "C103", f"fedtune client without --{option}", "--server and --keys", f"add --{option}"
            )
    require("flwr", "flower", "fedtune client", "F501")
    from fedtune.deploy.client import attend
    from fedtune.deploy.ports import split_address
    from fedtune.deploy.site_config import SiteConfig
    from fedtune.deploy.sites import columns_of
    from fedtune.deploy.supervisor import Stopped, stop_on_signals

    quiet()
    split_address(options.server, "--server")
    columns_of(options.map)
    own = (options.keys, options.home, options.data, options.shared, options.policy, options.trainer)
    keys, home, data, shared, policy, trainer = map(absolute, own)
    named = {"--data": data, "--shared": shared, "--policy": policy, "--keys": keys, "--trainer": trainer}
    for option, path in named.items():
        if path and not Path(path).exists():
            raise FedtuneError(
                "D201" if path in (data, shared) else "C105",
                f"nothing at '{path}' for {option}",
                "a file or folder",
                f"correct {option}",
            )
    config = SiteConfig(
        keys,
        options.server,
        home,
        "",
        data,
        options.model,
        options.device,
        policy,
        options.partition,
        options.map,
        shared,
        int(max(0.0, options.cache_gib) * (1 << 30)),
        max(0, options.keep_days),
        load=options.load,
        dtype=options.dtype,
        trainer=trainer,
    )
    if options.check is not None:
        from fedtune.config import read
        from fedtune.deploy.rehearsal import rehearsed

        for line in rehearsed(config, read(options.check, options.set) if options.check else None):
            print(plain(line), flush=True)
        return 0
    stop_on_signals()
    with shown(options) as tell:
        try:
            attend(config, lambda text: tell(Said(text)), tell)
        except Stopped:
            tell(Said("stopped; what was finished and not sent stays in the site's folder"))
    return 0


def approve(options: argparse.Namespace) -> int:
    """Say in words what the recipe does, and write down that this user approves it."""
    from fedtune.config import read
    from fedtune.deploy import approval

    recipe = read(options.recipe, options.set)
    stem = Path(options.recipe).stem if options.recipe else "demo"
    for line in approval.in_words(recipe):
        print(plain(line))
    if options.show:
        return 0
    by = approval.approve(Path(options.home).expanduser(), recipe, recipe.name or stem)
    print(plain(f"approved {recipe.fingerprint} by {', '.join(sorted(by))}"))
    return 0


def absolute(path: str) -> str:
    """A path of the command line for programs that start elsewhere; "" stays what it is."""
    return str(Path(path).expanduser().resolve()) if path else ""


def status(options: argparse.Namespace) -> int:
    if options.server and not options.keys:
        raise FedtuneError("C103", "--server without --keys", "the keys of a member", "add --keys DIR")
    if options.watch:
        from fedtune.cli.watching import watch

        watch(lambda: status_lines(options))
        return 0
    for line in status_lines(options):
        print(line)
    return 0


def status_lines(options: argparse.Namespace) -> list[str]:
    """What there is to say now, as a terminal may have it."""
    from fedtune.deploy.status import at_server, of_folder

    if options.server:
        lines = at_server(options.server, Path(options.keys).expanduser(), options.run)
    else:
        lines = of_folder(str(Path(options.run or ".").expanduser()))
    return [plain(line) for line in lines]
