"""What mixes a federation's experts best, on nine tasks of Super-NaturalInstructions?

    python simulations/experts.py --set model.name=FOLDER --data natural_instructions/train.jsonl
    [--seeds 1 2 3] [--tasks 9] [--rows 180] [--results FOLDER]

Each task is three clients; which clients share a task is found, not given. A text is the end of a row's input and
the beginning of its output, without the task's definition; losses are of the output's tokens, means over
clients, each on the half of its held-out rows on which nothing was chosen. Experts stand beside plain FedAvg for
the same compute of a client, and an adapter that each client trains alone. What is chosen (a merge, an expert for
a client) is chosen on the other half; steps, rates and routers were chosen on seed 11. A row that the file has is
not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from experts_table import (
    BASE,
    BEST_MERGE,
    FEDAVG,
    GENERAL_ROW,
    LOCAL,
    OWN,
    Losses,
    made_by_run,
    merged,
    recovered,
    said_of,
)
from record import RESULTS, hardware

from fedtune.config import parse_with
from fedtune.experts.routers import Routing
from fedtune.quiet import quiet
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.expert_scores import Matrix, alone, evaluate, halves_of, scored
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.run import run

CLIENTS, WARM_UP, EXPERTS, GATE = 3, 3, 3, 2  # clients of a task; rounds of each phase
ROUNDS = WARM_UP + EXPERTS + GATE
ALIKE = WARM_UP + 2 * EXPERTS + 1 + GATE  # rounds of plain FedAvg for the same compute; 1 for the sketches
INPUT, OUTPUT = 100, 40  # characters of a row's input, from its end, and of its output
ROUTERS: dict[str, Routing | None] = {
    "Arrow, two best": Routing("arrow", "topk", 2),
    "mean inputs, two best": Routing("means", "topk", 2),
    "trained gate": None,
}
TUNED = {"rounds": GATE, "owner": 1.0, "depth": True}
SUMS = "gate from sums"
OF_SUMS = {"fit": "sums"}
FOUND = "groups"
NEED = "ranks by need, own expert"
LAST = (BEST_MERGE, SUMS, FEDAVG, LOCAL, NEED)  # rows by which it is known how far a seed has come
KNOWN = {
    "base": BASE,
    "general": GENERAL_ROW,
    "best": "an expert for each client",
    "oracle": "least of all",
}


def texts(path: Path, tasks: int, most: int) -> list[dict[str, str]]:
    """Of the first tasks by name, each task's rows to its clients in turns."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for task in sorted({row["task"] for row in rows})[:tasks]:
        for number, row in enumerate([row for row in rows if row["task"] == task][:most]):
            said, wanted = row["input"][-INPUT:].strip(), row["output"][:OUTPUT].strip()
            site = f"{task.partition('_')[0]}-{number % CLIENTS}"
            made.append({"prompt": f"{said}\n", "response": wanted, "site": site})
    return made


def recipe_of(
    data: Path, clients: int, sets: Sequence[str], seed: int, rounds: int, method: Mapping[str, Any]
) -> Any:
    tree = {
        "seed": seed,
        "rounds": rounds,
        "model": {"threads": 1},
        "data": {
            "source": "jsonl",
            "path": str(data),
            "task": "instruct",
            "template": "plain",
            "max_length": 72,
            "client_test_share": 0.3,
            "test_share": 0.0,
        },
        "partition": {"by": "column", "column": "site", "clients": clients},
        "method": {
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
            "train": {"lr": 0.01, "steps": 4, "batch": 8},
            **method,
        },
        "evaluate": {"local": False, "centralised": False, "base": False},
    }
    return parse_with(tree, sets, "experts")


def played(recipe: Any, runs: Path, name: str) -> RunFolder:
    """A finished run; one that is there is taken up where it ended."""
    folder = RunFolder(runs / name)
    if not folder.path.exists():
        folder = create(runs, "", name)
        folder.write_json("config.json", recipe.model_dump(mode="json"))
    if not (folder.path / "result.json").exists():
        run(recipe, folder, lambda event: None)
    return folder


def of_experts(folder: RunFolder, known: Collection[str]) -> Iterator[tuple[str, Losses]]:
    """Losses by client of all that one run of experts gives, but for what is known."""
    if OWN not in known:
        matrix = evaluate(folder)
        yield FOUND, {"adjusted Rand index": recovered(matrix.groups), "experts": len(matrix.experts)}
        for name, said in KNOWN.items():
            yield said, {row["client"]: row[name] for row in matrix.report()}
        yield OWN, own_of(matrix)
    if len(made_by_run(folder)) < 2:  # nothing to choose from: everybody has the general expert
        yield from ((name, of_last(folder)) for name in (*ROUTERS, BEST_MERGE))
        return
    for name, routing in ROUTERS.items():
        if name not in known:
            yield name, routed(folder, routing)["losses"]
    yield from merged(folder)


def own_of(matrix: Matrix) -> Losses:
    """Of each client's own expert; who has none has the general one."""
    return {row["client"]: row["general"] if row["own"] is None else row["own"] for row in matrix.report()}


def of_last(folder: RunFolder) -> Losses:
    """Of the model with which a run ended."""
    workspace, _, _ = installed(folder, "last", data=True)
    return {
        name: scored(workspace.tunable, rows[1], workspace).loss
        for name, rows in halves_of(workspace).items()
    }


def rows_of(
    last: str,
    known: Collection[str],
    data: Path,
    clients: int,
    sets: Sequence[str],
    seed: int,
    runs: Path,
) -> Iterator[tuple[str, Losses]]:
    """Of a seed, the rows up to one of LAST."""

    def play(name: str, rounds: int, method: Mapping[str, Any]) -> RunFolder:
        return played(recipe_of(data, clients, sets, seed, rounds, method), runs, f"{seed}-{name}")

    if last == FEDAVG:
        yield FEDAVG, of_last(play("fedavg", ALIKE, {"type": "fedpeft"}))
        return
    experts = {"by": "clusters", "most": 12, "warm_up": WARM_UP, "gate": TUNED}
    if last == SUMS:  # behind the same experts
        experts["gate"] = OF_SUMS
        folder = play("sums", WARM_UP + EXPERTS, {"type": "experts", "experts": experts})
        found = len(made_by_run(folder)) > 1
        yield SUMS, routed(folder, None)["losses"] if found else of_last(folder)
        return
    if last == NEED:
        matrix = evaluate(play("need", ROUNDS, {"type": "experts", "experts": {**experts, "rank": "auto"}}))
        yield NEED, own_of(matrix)
        return
    folder = play("experts", ROUNDS, {"type": "experts", "experts": experts})
    if last == LOCAL:
        yield LOCAL, alone(folder)
    else:
        yield from of_experts(folder, known)


def show(table: Mapping[str, Any]) -> None:
    """Means over seeds, with the lowest and highest, and what they say of routers."""
    for name, seeds in table["rows"].items():
        means = [fmean(losses.values()) for losses in seeds.values()]
        print(f"{name:<42}{fmean(means):8.4f}  ({min(means):.4f} to {max(means):.4f}, {len(means)} seeds)")
    print(table["found"])
    for name in (OWN, *ROUTERS, SUMS):
        said = said_of(table["rows"], name)
        print(f"{name:<42}" + ", ".join(f"{key} {value:.2f}" for key, value in said.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", type=Path, required=True, help="task, input, output: a JSON line each")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--tasks", type=int, default=9)
    parser.add_argument("--rows", type=int, default=180, help="of each task at most")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    parser.add_argument("--runs", type=Path, help="where the runs are kept (default: nowhere)")
    options = parser.parse_args()
    quiet()
    path = options.results / "experts.json"
    table = json.loads(path.read_text()) if path.exists() else {"rows": {}, "found": {}}
    table |= {
        "recipe": f"{options.tasks} tasks of Super-NaturalInstructions, {CLIENTS} clients each",
        "hardware": hardware(),
        "metric": "loss",
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or Path(folder)
        runs.mkdir(parents=True, exist_ok=True)
        data = runs / "rows.jsonl"
        made = texts(options.data, options.tasks, options.rows)
        data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        clients = len({row["site"] for row in made})
        for last, seed in product(LAST, map(str, options.seeds)):
            known = [name for name, seeds in table["rows"].items() if seed in seeds]
            if last in known:
                continue
            for name, losses in rows_of(last, known, data, clients, options.set, int(seed), runs):
                place = table["found"] if name == FOUND else table["rows"].setdefault(name, {})
                place[seed] = {client: round(loss, 4) for client, loss in losses.items()}
                path.write_text(json.dumps(table, indent=1) + "\n")
    show(table)


if __name__ == "__main__":
    main()
