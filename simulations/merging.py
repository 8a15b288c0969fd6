"""Six experts that never met become one adapter: which merge keeps what they learned?

    python simulations/merging.py --set model.name=FOLDER --set data.path=input.txt [--case strangers]
    [--seeds 1 2 3] [--results FOLDER]

Six speakers of simulations/shakespeare.toml train an adapter each, alone; the merges of fedtune.aggregate
make one of them, once.
Two cases, each with a file in simulations/results:

one-start  from one adapter (the same random A), 100 steps, on a base that never saw a play: whatever moves
           towards the play helps
strangers  as adapters found on a client store: an A of its own each, and a base that was first tuned on six
           other speakers, all of its
           weights, so that it is worth keeping

The merges' settings are those of the papers or of fedtune/aggregate; those of the second case were chosen on
seed 11.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import HERE, RESULTS, hardware

from fedtune.aggregate import MERGES, ClientAdapter
from fedtune.config import method_of, read
from fedtune.model.encode import encode
from fedtune.model.export import save_merged
from fedtune.model.fit import fit
from fedtune.model.lora_ranks import resize
from fedtune.model.score import score
from fedtune.quiet import quiet
from fedtune.rng import seed_of, stream
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.workspace import Workspace, build_workspace
from fedtune.types import State

SPEAKERS = 6
WIDE = 48  # six experts of rank 8: what the exact mean needs
MERGED: dict[str, Callable[[Sequence[ClientAdapter], int, float], Any]] = {
    "mean of products": MERGES["mean"](),
    "task arithmetic, 0.3": MERGES["task"](lam=0.3),
    "TIES, density 0.2, lambda 0.5": MERGES["ties"](density=0.2, lam=0.5),
    "DARE, p 0.5": MERGES["dare"](p=0.5, seed=0),
    "breadcrumbs, 2/6": MERGES["breadcrumbs"](keep=0.85, outliers=0.01, lam=2 / 6),
    "LiNeS on task arithmetic, 0.5 + 0.5": MERGES["lines"](alpha=0.5, beta=0.5, of=MERGES["task"](lam=0.5)),
    "PCB, keep 0.2": MERGES["pcb"](keep=0.2, lam=1.0),
}
Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """steps: of each expert alone; base_steps: of the base on other speakers; own_start: whether every expert
    draws an A of its own."""

    file: str
    about: str
    steps: int
    base_steps: int = 0
    own_start: bool = False


CASES = {
    "one-start": Case("merging", "shakespeare.toml, six speakers, 100 steps alone", 100),
    "strangers": Case(
        "merging-strangers",
        "shakespeare.toml, six speakers, 100 steps alone from a start of its own; base: 300 steps on six "
        "others",
        100,
        300,
        True,
    ),
}


def by_factor(
    experts: Sequence[ClientAdapter], rule: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """What merges of A and of B apart from each other make: the known-bad way."""
    return {
        name: np.asarray(rule(np.stack([expert.tensors[name] for expert in experts])), np.float32)
        for name in experts[0].tensors
    }


def ties_of(stack: np.ndarray, density: float = 0.2, lam: float = 1.0) -> np.ndarray:
    """TIES on plain tensors (experts, ...)."""
    least = np.quantile(np.abs(stack).reshape(len(stack), -1), 1 - density, axis=1).reshape(
        -1, *[1] * (stack.ndim - 1)
    )
    kept = np.where(np.abs(stack) >= least, stack, 0)
    agree = (np.sign(kept) == np.where(kept.sum(axis=0) >= 0, 1, -1)) & (kept != 0)
    merged: np.ndarray = lam * (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return merged


def started(start: Tensors, case: Case, seed: int, number: int) -> dict[str, np.ndarray]:
    """The adapter that an expert begins with: the common one, or peft's Kaiming-uniform A from a draw of its
    own."""
    if not case.own_start:
        return dict(start)
    draw = stream("own start", seed, number)
    drawn = {
        name: draw.uniform(-1, 1, value.shape) / math.sqrt(value.shape[1])
        for name, value in start.items()
        if name.endswith("lora_A.weight")
    }
    return {name: np.asarray(drawn.get(name, value), np.float32) for name, value in start.items()}


def trained(workspace: Workspace, method: Any, case: Case, seed: int) -> list[ClientAdapter]:
    """Every client's adapter after training alone."""
    shared = method.start(workspace.tunable).shared
    experts = []
    for number in workspace.names:
        method.alone(
            workspace.tunable,
            workspace.train(number),
            State(started(shared, case, seed, number)),
            seed_of("alone", seed, number + 1),
        )
        experts.append(ClientAdapter(number, workspace.tunable.read(), 1.0, method.seat()[1]))
    return experts


@contextmanager
def base_of(sets: Sequence[str], case: Case, seed: int) -> Iterator[list[str]]:
    """Overrides that name the case's base: the recipe's own, or that model after tuning on the next six
    speakers, all of its weights."""
    if not case.base_steps:
        yield []
        return
    kind = ["method.adapter.kind=full", "method.train.lr=1e-3", f"method.train.steps={case.base_steps}"]
    recipe, _, workspace = built([*sets, *kind, "rounds=1", f"partition.clients={2 * SPEAKERS}"], seed)
    rows = [row for slice_ in workspace.federation.clients[SPEAKERS:] for row in slice_.train]
    data = recipe.data
    others = encode(
        rows,
        workspace.base,
        max_length=data.max_length,
        stride=data.stride,
        separator=data.separator,
        overlong=data.overlong,
    )
    report = fit(workspace.tunable, others, recipe.method.train, seed_of("base", seed))
    with tempfile.TemporaryDirectory() as folder:
        save_merged(workspace.tunable, folder, "")
        print(
            f"seed {seed}: base tuned for {report.steps} steps, {report.seconds:.0f} s, loss "
            f"{report.loss:.3f}",
            flush=True,
        )
        yield [f"model.name={folder}"]


def built(sets: Sequence[str], seed: int) -> tuple[Any, Any, Workspace]:
    recipe = read(str(HERE / "shakespeare.toml"), [*sets, f"seed={seed}"])
    method = method_of(recipe)
    return recipe, method, build_workspace(recipe, method, ClientStates(None), lambda event: None)


def played(sets: list[str], case: Case, seed: int) -> dict[str, float]:
    """Test perplexity of the base, of the experts one by one (their mean), and of every merge."""
    with base_of(sets, case, seed) as base:
        _, method, workspace = built(
            [*sets, *base, f"partition.clients={SPEAKERS}", f"rounds={case.steps // 10}"], seed
        )
    start = method.start(workspace.tunable)
    rank, scale = method.seat()

    def perplexity(tensors: Tensors) -> float:
        resize(
            workspace.tunable,
            next(value.shape[0] for name, value in tensors.items() if name.endswith("lora_A.weight")),
            scale,
        )
        workspace.tunable.write(tensors)
        return score(workspace.tunable, workspace.test(), 32).metric

    found = {"base": perplexity(start.shared)}
    experts = trained(workspace, method, case, seed)
    found["one expert"] = float(np.mean([perplexity(expert.tensors) for expert in experts]))
    found["mean of factors"] = perplexity(by_factor(experts, lambda stack: stack.mean(axis=0)))
    found["TIES on factors"] = perplexity(by_factor(experts, ties_of))
    for name, merge in MERGED.items():
        found[name] = perplexity(merge(experts, WIDE, scale).tensors)
    found["mean of products, cut to rank 8"] = perplexity(MERGES["mean"]()(experts, rank, scale).tensors)
    method.install(State(start.shared), workspace.tunable)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--case", choices=CASES, default="one-start")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    quiet()
    case = CASES[options.case]
    rows: dict[str, dict[str, float]] = {}
    for seed in options.seeds:
        for name, value in played(options.set, case, seed).items():
            rows.setdefault(name, {})[str(seed)] = value
        table = {"recipe": case.about, "hardware": hardware(), "metric": "perplexity", "rows": rows}
        (options.results / f"{case.file}.json").write_text(json.dumps(table, indent=1) + "\n")
    for name, values in rows.items():
        print(
            f"{name:<38}{np.mean(list(values.values())):10.3f}  ({min(values.values()):.3f} to "
            f"{max(values.values()):.3f})"
        )


if __name__ == "__main__":
    main()
