"""fedtune experts list | eval | route | merge | prune | export | add | remove: the experts of a run."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.cli.common import settings_of
from fedtune.cli.merge import RULES
from fedtune.cli.runs import opened
from fedtune.cli.waits import waiting
from fedtune.disk import json_text
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet

SCORING = "scoring experts on held-out rows"  # what a wait says


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "experts", help="list, score, merge, export, add or remove a run's LoRA experts"
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, said: str, command: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(name, help=said)
        made.add_argument("run", help="the run's folder")
        made.set_defaults(command=command)
        return made

    verb("list", "the experts, what they stand on and who made them", show)
    made = verb("eval", "score every expert on every client's held-out rows", evaluate)
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    made = verb("route", "score a router over all experts, token by token", route)
    made.add_argument(
        "--gate",
        choices=("trained", "means", "arrow"),
        default="",
        help="trained: the gate that the run has trained, and the default where there is one; means: by what "
        "owners' rows look like; arrow: by the adapters alone",
    )
    made.add_argument(
        "--keep",
        choices=("topk", "topp", "dense"),
        default="topk",
        help="means, arrow: which experts have a say",
    )
    made.add_argument("--k", type=int, default=2, help="topk: how many")
    made.add_argument("--p", type=float, default=0.6, help="topp: until their shares add up to this")
    made.add_argument(
        "--null", action="store_true", help="what is like nobody's rows goes to the general expert alone"
    )
    made.add_argument(
        "--local", action="store_true", help="also train an adapter by each client alone, to compare"
    )
    made = verb("merge", "make a new expert of several, on the products B A", merge)
    made.add_argument("experts", nargs="+", metavar="ID", help="experts that stand on the same one")
    made.add_argument(
        "--by",
        choices=[rule for rule in RULES if rule != "greedy"],
        default="mean",
        help="as in fedtune merge",
    )
    made.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the rule"
    )
    made.add_argument(
        "--rank", type=int, default=0, metavar="R", help="cut to this rank; without it the sum of ranks"
    )
    made.add_argument("--as", dest="name", required=True, metavar="ID", help="the id of the new expert")
    made = verb("prune", "remove experts that are like another one and that no client misses", prune)
    made.add_argument(
        "--above", type=float, default=0.9, metavar="COSINE", help="how alike two experts are at least"
    )
    made.add_argument("--dry-run", action="store_true", help="say which, and remove none")
    made = verb("export", "write one expert as an adapter, or several for a server that loads many", export)
    made.add_argument("experts", nargs="*", metavar="ID", help="which; none: all")
    made.add_argument(
        "--max-rank", type=int, default=64, metavar="R", help="several: the server's greatest rank"
    )
    made.add_argument("--to", required=True, metavar="DIR", help="a folder that does not exist yet")
    made = verb("add", "take in an adapter that its owner trained", add)
    made.add_argument(
        "adapter", metavar="FOLDER", help="an adapter of the same base, by fedtune or stock peft"
    )
    made.add_argument("--as", dest="name", required=True, metavar="ID", help="the id of the new expert")
    made.add_argument("--on-general", action="store_true", help="it was trained on top of the general expert")
    made = verb("remove", "take an expert out at once, and certify it", remove)
    made.add_argument("expert", metavar="ID", help="the expert that leaves")
    made.add_argument("--keys", metavar="DIR", help="a member's keys, which sign the certificate")


def show(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.experts.cards import cards
    from fedtune.runtime.expert_library import library
    from fedtune.runtime.expert_routing import gate_in

    print(f"{'expert':<20}{'made by':<9}{'on':<12}{'rank':>5}{'owners':>8}{'rounds':>8}{'loss':>9}")
    place = library(opened(options.run))
    for card in cards(place).values():
        loss = f"{card.losses[-1]:.4f}" if card.losses else "-"
        print(
            f"{card.id:<20}{card.made_by:<9}{card.beneath or 'the base':<12}{card.rank:>5}{card.owners:>8}"
            f"{card.rounds:>8}{loss:>9}"
        )
    if about := gate_in(place):
        print(f"a trained gate over {', '.join(about['experts'])}: {about['keep']}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.expert_scores import evaluate
    from fedtune.runtime.folder import EXPERTS

    with waiting(SCORING):
        matrix = evaluate(opened(options.run))
    rows = matrix.report()
    found = {"losses": matrix.told_of, "clients": rows, "metric": matrix.metric}
    opened(options.run).write_json(EXPERTS, found)  # for the run's report
    if options.json:
        print(json_text(found, indent=2))
        return 0
    wide = max(12, *(len(name) + 2 for name in matrix.told_of))
    print("losses on the second half of each client's held-out rows")
    print(f"{'client':<24}" + "".join(f"{name:>{wide}}" for name in matrix.told_of))
    for client in matrix.clients:
        print(f"{client:<24}" + "".join(f"{told[client]:>{wide}.4f}" for told in matrix.told_of.values()))
    print("\nchosen on the first half")
    print(f"{'client':<24}{'general':>10}{'own':>10}{'best':>10}{'oracle':>10}  expert")
    for row in rows:
        own = "-" if row["own"] is None else f"{row['own']:.4f}"
        chosen = "general: none beats it" if row["fell_back"] else row["best_expert"]
        told = f"{row['general']:>10.4f}{own:>10}{row['best']:>10.4f}{row['oracle']:>10.4f}"
        print(f"{row['client']:<24}{told}  {chosen}")
    return 0


def route(options: argparse.Namespace) -> int:
    if options.k < 1 or not 0 < options.p <= 1:
        raise FedtuneError(
            "C102", f"--k {options.k} --p {options.p:g}", "k of 1 or more, p in (0, 1]", "correct it"
        )
    quiet()
    from fedtune.experts.routers import Routing
    from fedtune.runtime.expert_library import library
    from fedtune.runtime.expert_routing import gate_in, routed
    from fedtune.runtime.expert_scores import alone, evaluate

    folder = opened(options.run)
    trained = options.gate == "trained" or (not options.gate and gate_in(library(folder)))
    routing = None if trained else Routing(options.gate or "means", options.keep, options.k, options.p)
    with waiting(SCORING):
        done = routed(folder, routing, options.null)
        rows, local = evaluate(folder).report(), alone(folder) if options.local else {}
    print("losses on the second half of each client's held-out rows")
    columns = ("base", "general", "own", "best", "oracle")
    print(
        f"{'client':<24}"
        + "".join(f"{name:>10}" for name in (*columns, "routed", *(["local"] if local else [])))
    )
    for row in rows:
        client = row["client"]
        values = [
            *(row[name] for name in columns),
            done["losses"][client],
            *([local[client]] if local else []),
        ]
        told = "".join(f"{'-':>10}" if value is None else f"{value:>10.4f}" for value in values)
        print(f"{client:<24}{told}")
    health = done["health"]
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in health["shares"].items())
    print(f"\nshares {shares}; entropy {health['entropy']:.3f} nats")
    if health["starved"]:
        print(f"starved: {', '.join(health['starved'])}")
    if health["collapsed"]:
        print("collapsed: one expert has nearly everything")
    return 0


def merge(options: argparse.Namespace) -> int:
    if options.rank < 0:
        raise FedtuneError("C102", f"--rank {options.rank}", "1 or more", "correct it, or leave it out")
    quiet()
    from fedtune.runtime.expert_changes import merge
    from fedtune.runtime.merge import Asked, cost

    asked = Asked(options.by, settings_of(options.set), (), options.rank)
    with waiting("merging the experts"):
        merged = merge(opened(options.run), options.experts, asked, options.name)
    for sentence in cost(merged):
        print(sentence)
    print(options.name)
    return 0


def prune(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.expert_changes import superfluous
    from fedtune.runtime.expert_library import remove
    from fedtune.runtime.expert_scores import evaluate

    folder = opened(options.run)
    with waiting(SCORING):
        gone = superfluous(folder, options.above, evaluate(folder))
    for name, other, cosine in gone:
        if not options.dry_run:
            remove(folder, name, datetime.now(UTC))
        print(f"{name}: like {other} (cosine {cosine:.3f}), and no client's best loss is greater without it")
    if not gone:
        print(f"no two experts have a cosine above {options.above:g} of which one is not missed")
    return 0


def export(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.expert_changes import export

    target = Path(options.to).expanduser().resolve()
    with waiting("writing the experts"):
        paths = export(opened(options.run), options.experts, target, options.max_rank)
    for path in paths:
        print(path)
    return 0


def add(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.expert_library import add

    source = Path(options.adapter).expanduser().resolve()
    card = add(opened(options.run), source, options.name, options.on_general)
    print(f"{card.id}: rank {card.rank}, on {card.beneath or 'the base'}")
    return 0


def remove(options: argparse.Namespace) -> int:
    quiet()
    from fedtune.runtime.expert_library import remove

    keys = Path(options.keys).expanduser() if options.keys else None
    print(remove(opened(options.run), options.expert, datetime.now(UTC), keys))
    return 0
