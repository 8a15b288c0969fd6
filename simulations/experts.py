"""What mixes a federation's experts best, and is a gate worth its rounds?

    python simulations/experts.py --set model.name=FOLDER --data natural_instructions/train.jsonl
    [--seeds 1 2 3] [--tasks 3] [--rows 80] [--results FOLDER]

Each task of Super-NaturalInstructions is two clients, and an expert of theirs (groups as given, not found). Ten
rounds: two of warm-up, five of experts and three of a gate over them, which all other routers of these seven
rounds are compared with; then ten rounds that train experts to the end, with equal ranks and with ranks by need,
of as many in all. Nothing was tuned. Losses are means over the clients, each on the
half of its held-out rows on which nothing was chosen.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from record import RESULTS, hardware

from fedtune.config import parse_with
from fedtune.data import load
from fedtune.experts.routers import Routing
from fedtune.quiet import quiet
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.expert_scores import evaluate
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.run import run

CLIENTS, ROUNDS, WARM_UP, GATE = 2, 10, 2, 3  # clients of a task; rounds in all, before experts, of the gate
ROUTERS = {
    "Arrow, two best": Routing("arrow", "topk", 2),
    "mean inputs, two best": Routing("means", "topk", 2),
    "mean inputs, all": Routing("means", "dense"),
}
RANKS = {"equal ranks": "equal", "ranks by need": "auto"}
KNOWN = {"own": "own expert", "best": "chosen on the other half", "oracle": "least of all (oracle)"}


def rows_of(path: Path, tasks: int, most: int) -> list[dict[str, str]]:
    """Texts of the first tasks by name, each task's rows to its clients in turns."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for task in sorted({row["task"] for row in rows})[:tasks]:
        for number, row in enumerate([row for row in rows if row["task"] == task][:most]):
            text = f"{row['input']}\n{row['output']}"
            made.append({"text": text, "site": f"{task[:7]}-{number % CLIENTS}"})
    return made


def recipe_of(data: Path, clients: int, sets: Sequence[str], seed: int, experts: Mapping[str, Any]) -> Any:
    by = {"by": "given", "groups": [""], "warm_up": WARM_UP, "min_clients": CLIENTS, **experts}
    tree = {
        "seed": seed,
        "rounds": ROUNDS,
        "model": {"threads": 1},
        "data": {
            "source": "jsonl",
            "path": str(data),
            "task": "causal-lm",
            "max_length": 96,
            "client_test_share": 0.2,
            "test_share": 0.0,
        },
        "partition": {"by": "column", "column": "site", "clients": clients},
        "method": {
            "type": "experts",
            "adapter": {"kind": "lora", "rank": 8},
            "experts": by,
            "train": {"lr": 0.01, "steps": 3, "batch": 8},
        },
        "evaluate": {"local": False, "centralised": False, "base": False},
    }
    recipe = parse_with(copy.deepcopy(tree), sets, "experts")
    names = [client.name for client in load(recipe.data, recipe.partition, seed).clients]
    by["groups"] = [name.rpartition("-")[0] for name in names]
    return parse_with(tree, sets, "experts")


def played(recipe: Any, root: Path, name: str) -> RunFolder:
    folder = create(root, "", name)
    folder.write_json("config.json", recipe.model_dump(mode="json"))
    run(recipe, folder, lambda event: None)
    return folder


def means_of(folder: RunFolder) -> dict[str, float]:
    report = evaluate(folder).report()
    # who has no expert has the general one
    told = [row | {"own": row["general"] if row["own"] is None else row["own"]} for row in report]
    return {name: fmean(row[name] for row in told) for name in ("base", "general", *KNOWN)}


def of_seed(
    data: Path, clients: int, sets: Sequence[str], seed: int, root: Path, lr: float
) -> dict[str, float]:
    gate = {"gate": {"rounds": GATE, "lr": lr}}
    folder = played(recipe_of(data, clients, sets, seed, gate), root, "gate")
    losses = means_of(folder)
    found = {"base": losses["base"], "general": losses["general"]}
    found |= {said: losses[name] for name, said in KNOWN.items()}
    for name, routing in ROUTERS.items():
        found[name] = fmean(routed(folder, routing)["losses"].values())
    found[f"trained gate, two best, {GATE} rounds more"] = fmean(routed(folder, None)["losses"].values())
    for name, rank in RANKS.items():
        folder = played(recipe_of(data, clients, sets, seed, {"rank": rank}), root, rank)
        losses = means_of(folder)
        whole = f"{ROUNDS} rounds of experts, {name}"
        found |= {f"{whole}: {said}": losses[key] for key, said in {"general": "general", **KNOWN}.items()}
        found[f"{whole}: mean inputs, two best"] = fmean(
            routed(folder, ROUTERS["mean inputs, two best"])["losses"].values()
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", type=Path, required=True, help="task, input, output: a JSON line each")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rows", type=int, default=80, help="of each task at most")
    parser.add_argument("--lr", type=float, default=0.01, help="of the gate")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    quiet()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        made = rows_of(options.data, options.tasks, options.rows)
        data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        for seed in options.seeds:
            root = Path(folder) / str(seed)
            clients = len({row["site"] for row in made})
            for name, value in of_seed(data, clients, options.set, seed, root, options.lr).items():
                rows.setdefault(name, {})[str(seed)] = value
            table = {
                "recipe": f"{options.tasks} tasks of Super-NaturalInstructions, {CLIENTS} clients each, {options.rows} rows a task",
                "hardware": hardware(),
                "metric": "loss",
                "rows": rows,
            }
            (options.results / "experts.json").write_text(json.dumps(table, indent=1) + "\n")
    for name, values in rows.items():
        print(
            f"{name:<62}{fmean(values.values()):8.4f}  ({min(values.values()):.4f} to {max(values.values()):.4f})"
        )


if __name__ == "__main__":
    main()
