"""fedtune merge: finished LoRA adapters of one base become one."""

from __future__ import annotations

import argparse
from typing import Any

from fedtune.cli.common import settings_of
from fedtune.cli.waits import waiting
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet

RULES = ("mean", "selma", "task", "ties", "dare", "breadcrumbs", "lines", "pcb", "greedy")


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "merge", help="merge several LoRA adapters of one base into one, on the products B A"
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="folders of PEFT adapters, or of finished runs"
    )
    said = (
        "mean of products; selma: equally weighed; task: lam times the sum; ties, dare, breadcrumbs, pcb: "
        "entry by entry; lines: scaled by depth; "
    )
    parser.add_argument(
        "--by",
        choices=RULES,
        default="mean",
        help=said + "greedy: those that do not worsen the score of --eval",
    )
    told = (
        "an option of the rule, such as lam=0.3 (task, ties, breadcrumbs, pcb), density=0.2 (ties), p=0.5 "
        "and seed=0 (dare), "
    )
    told += (
        "keep=0.85 and outliers=0.01 (breadcrumbs), keep=0.2 (pcb), alpha=A and beta=B (lines); lines and "
        "greedy follow any other rule: of=ties"
    )
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help=told)
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        default=[],
        metavar="W",
        help="how much each adapter counts (default: all the same)",
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="reduce to this rank (SVD); default: the sum of the ranks"
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="MODEL",
        help="the base of all adapters, whatever they call it; their layers are checked against it",
    )
    parser.add_argument(
        "--eval", metavar="RUN", help="score the base, the adapters and the result on this run's test set"
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.set_defaults(command=merge)


def merge(options: argparse.Namespace) -> int:
    if options.rank is not None and options.rank < 1:
        raise FedtuneError(
            "C102", f"--rank {options.rank}", "1 or more", "correct it, or leave it out for the sum of ranks"
        )
    settings = settings_of(options.set)
    quiet()
    from fedtune import api
    from fedtune.runtime.merge import cost

    rule = {
        "by": options.by,
        "options": settings,
        "weights": options.weights,
        "rank": options.rank or 0,
        "base": options.base,
    }
    with waiting("reading the adapters"):
        merged = api.merge(options.adapters, options.to, run=options.eval or "", **rule)
    for name, score in merged.scores.items():
        print(f"{name}: {score.name} {score.metric:.4f}, loss {score.loss:.4f}")
    if options.by == "greedy":
        print(
            f"kept {len(merged.used)} of {len(options.adapters)}, chosen by that test set: "
            f"{', '.join(str(path) for path in merged.used)}"
        )
    for sentence in cost(merged):
        print(sentence)
    print(options.to)
    return 0
