"""Six experts that never met become one adapter: which merge keeps what they learned?

    python simulations/merging.py --set model.name=FOLDER --set data.path=input.txt [--seeds 1 2 3]

Six speakers of simulations/shakespeare.toml train an adapter each, alone, from one start (100 steps); the merges of fedtune.aggregate make one of them,
once. Their settings are those of the papers or of fedtune/aggregate, none was tuned here. Writes simulations/results/merging.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from record import HERE, hardware

from fedtune import methods
from fedtune.aggregate import MERGES, Answer
from fedtune.config import read
from fedtune.model.ranks import resize
from fedtune.model.score import score
from fedtune.rng import seed_of
from fedtune.runtime.states import Memories
from fedtune.runtime.world import World, build_world
from fedtune.types import State

SMALL = ["partition.clients=6", "rounds=10"]
WIDE = 48  # six experts of rank 8: what the exact mean needs
MERGED: dict[str, Callable[[Sequence[Answer], int, float], Any]] = {
    "mean of products": MERGES["mean"](),
    "task arithmetic, 0.3": MERGES["task"](lam=0.3),
    "TIES, density 0.2, lambda 0.5": MERGES["ties"](density=0.2, lam=0.5),
    "DARE, p 0.5": MERGES["dare"](p=0.5, seed=0),
    "breadcrumbs, 2/6": MERGES["breadcrumbs"](keep=0.85, outliers=0.01, lam=2 / 6),
    "LiNeS on task arithmetic, 0.5 + 0.5": MERGES["lines"](alpha=0.5, beta=0.5, of=MERGES["task"](lam=0.5)),
    "PCB, keep 0.2": MERGES["pcb"](keep=0.2, lam=1.0),
}


def by_factor(experts: Sequence[Answer], rule: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """What merges of A and of B apart from each other make: the known-bad way."""
    return {name: np.float32(rule(np.stack([expert.tensors[name] for expert in experts]))) for name in experts[0].tensors}


def ties_of(stack: np.ndarray, density: float = 0.2, lam: float = 1.0) -> np.ndarray:
    """TIES on plain tensors (experts, ...)."""
    least = np.quantile(np.abs(stack).reshape(len(stack), -1), 1 - density, axis=1).reshape(-1, *[1] * (stack.ndim - 1))
    kept = np.where(np.abs(stack) >= least, stack, 0)
    agree = (np.sign(kept) == np.where(kept.sum(axis=0) >= 0, 1, -1)) & (kept != 0)
    merged: np.ndarray = lam * (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return merged


def trained(world: World, method: Any, recipe: Any) -> list[Answer]:
    """Every client's adapter after training alone."""
    start = method.start(world.bench)
    experts = []
    for number in world.names:
        method.alone(world.bench, world.train(number), start, seed_of("alone", recipe.seed, number + 1))
        experts.append(Answer(number, world.bench.read(), 1.0, method.seat()[1]))
    return experts


def played(sets: list[str], seed: int) -> dict[str, float]:
    """Test perplexity of the base, of the experts one by one (their mean), and of every merge."""
    recipe = read(str(HERE / "shakespeare.toml"), [*sets, *SMALL, f"seed={seed}"])
    method = methods.build(recipe.method, recipe.rounds, recipe.aggregate)
    world = build_world(recipe, method, Memories(None), lambda event: None)
    start = method.start(world.bench)
    rank, scale = method.seat()  # type: ignore[attr-defined]

    def perplexity(tensors: Mapping[str, np.ndarray]) -> float:
        resize(world.bench, next(value.shape[0] for name, value in tensors.items() if name.endswith("lora_A.weight")), scale)
        world.bench.write(tensors)
        return score(world.bench, world.test(), 32).metric

    found = {"base": perplexity(start.shared)}
    experts = trained(world, method, recipe)
    found["one expert"] = float(np.mean([perplexity(expert.tensors) for expert in experts]))
    found["mean of factors"] = perplexity(by_factor(experts, lambda stack: stack.mean(axis=0)))
    found["TIES on factors"] = perplexity(by_factor(experts, ties_of))
    for name, merge in MERGED.items():
        found[name] = perplexity(merge(experts, WIDE, scale).tensors)
    found["mean of products, cut to rank 8"] = perplexity(MERGES["mean"]()(experts, rank, scale).tensors)
    method.install(State(start.shared), world.bench)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for seed in options.seeds:
        for name, value in played(options.set, seed).items():
            rows.setdefault(name, {})[str(seed)] = value
        table = {"recipe": "shakespeare.toml, six speakers, 100 steps alone", "hardware": hardware(), "metric": "perplexity", "rows": rows}
        (HERE / "results" / "merging.json").write_text(json.dumps(table, indent=1) + "\n")
    for name, values in rows.items():
        print(f"{name:<38}{np.mean(list(values.values())):10.3f}  ({min(values.values()):.3f} to {max(values.values()):.3f})")


if __name__ == "__main__":
    main()
