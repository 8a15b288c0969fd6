"""Two of ten clients lie: what they send is ten times their move, backwards. Which rules still learn?

    python simulations/byzantine.py --set model.name=FOLDER --set data.path=input.txt [--seeds 1 2 3]
    [--results FOLDER]

Runs simulations/shakespeare.toml with ten speakers and six rounds; writes simulations/results/byzantine.json.
A rule's share is what it gains in test
loss over the base model, of what the plain mean gains where nobody lies.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import ALONE, HERE, RESULTS, hardware

from fedtune.config import read
from fedtune.runtime.folder import create
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Link, Transport
from fedtune.runtime.run import run
from fedtune.runtime.workspace import Workspace
from fedtune.types import Client, Round, Tensors, Update

LIARS, TIMES = (2, 7), -10.0
RULES = {
    "mean": [],
    "median": [],
    "trimmed": ["aggregate.trim=0.2"],
    "krum": ["aggregate.faulty=2"],
    "krum, one chosen": ["aggregate.faulty=2", "aggregate.chosen=1"],
    "clipped": [],
}
SMALL = ["partition.clients=10", "rounds=6", "method.server.optimizer=none", *ALONE[1:]]


class Lying:
    """A method whose verbs lie at some clients; everything else is the method's own."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self.verbs = {name: replace(verb, work=lying(verb.work)) for name, verb in method.verbs.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


def lying(half: Callable[[Client, Tensors, Round], Update]) -> Callable[[Client, Tensors, Round], Update]:
    def verb(client: Client, given: Tensors, now: Round) -> Update:
        update = half(client, given, now)
        if client.id not in LIARS:
            return update
        moved = {
            name: given[name] + TIMES * (value / update.weight - given[name])
            for name, value in update.tensors.items()
        }
        return replace(update, tensors={name: value * update.weight for name, value in moved.items()})

    return verb


def with_liars(link: Link, workspace: Workspace) -> Transport:
    return local_transport(replace(link, method=Lying(link.method)), workspace.client, workspace.done)


def play(sets: list[str], seed: int, liars: bool) -> dict[str, float]:
    """One run; the base model's loss and the federation's."""
    recipe = read(str(HERE / "shakespeare.toml"), [*SMALL, *sets, f"seed={seed}", "name=run"])
    with tempfile.TemporaryDirectory() as runs:
        result = run(recipe, create(Path(runs), "", "run"), lambda event: None, with_liars if liars else None)
    return {
        "base": math.log(result["base"]),
        "federated": math.log(result["federated"]) if math.isfinite(result["federated"]) else math.inf,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    path = options.results / "byzantine.json"
    table: dict[str, Any] = {
        "recipe": "shakespeare.toml, ten speakers, two of them lie",
        "hardware": hardware(),
        "rows": {},
    }
    for seed in options.seeds:
        clean = play([*options.set, "aggregate.rule=mean"], seed, liars=False)
        for name, own in RULES.items():
            rule = name.partition(",")[0]
            got = play([*options.set, f"aggregate.rule={rule}", *own], seed, liars=True)
            share = (got["base"] - got["federated"]) / (clean["base"] - clean["federated"])
            table["rows"].setdefault(name, {})[str(seed)] = {
                "loss": got["federated"],
                "clean": clean["federated"],
                "base": got["base"],
                "share": share,
            }
            text = f"loss {got['federated']:8.3f}, clean {clean['federated']:.3f}, base {got['base']:.3f}"
            print(f"seed {seed}  {name:<18} {text}: {share:7.1%} of the clean gain", flush=True)
            path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
