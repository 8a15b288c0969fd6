"""Tiny adapters, and the naive twin of everything: products formed as matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.aggregate import ClientAdapter, Combined, Rule, WeightedMean, split
from fedtune.types import Round, Tensors

SHAPES = {"layers.0.q": (12, 9), "layers.1.up": (8, 20)}  # one tall, one wide: module -> (d, k)
NOW = Round(1, 7, (0, 1))


def adapter(rank: int, seed: int, b: float = 1.0) -> dict[str, np.ndarray]:
    """Two LoRA pairs, a bias, a DoRA magnitude vector and a number; `b` scales B."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {
        "head.bias": rng.normal(size=5),
        "layers.0.q.lora_magnitude_vector": rng.normal(size=12),
        "temperature": rng.normal(size=()),
    }
    for module, (d, k) in SHAPES.items():
        made[f"{module}.lora_A.weight"] = rng.normal(size=(rank, k)) / 3
        made[f"{module}.lora_B.weight"] = b * rng.normal(size=(d, rank))
    return {name: np.asarray(value, np.float32) for name, value in made.items()}


def near(start: Tensors, seed: int, step: float = 0.3) -> dict[str, np.ndarray]:
    """What a client makes of `start`: everything moved a little."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(value + step * rng.normal(size=value.shape), np.float32)
        for name, value in start.items()
    }


def products(state: Combined | Tensors, scale: float) -> dict[str, np.ndarray]:
    """What an adapter adds to the weights, module by module, with its residual."""
    combined = state if isinstance(state, Combined) else Combined(state)
    made = {
        name: scale * (np.float64(pair.B) @ np.float64(pair.A))
        for name, pair in split(combined.tensors)[0].items()
    }
    for name, pair in combined.residual.items():
        made[name] = made[name] + np.float64(pair.B) @ np.float64(pair.A)
    return made


def mean_product(answers: Sequence[ClientAdapter]) -> dict[str, np.ndarray]:
    total = sum(answer.weight for answer in answers)
    each = [(answer.weight / total, products(answer.tensors, answer.scale)) for answer in answers]
    return {name: sum((p * own[name] for p, own in each), np.zeros(shape)) for name, shape in SHAPES.items()}


def apart(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Relative Frobenius distance over all modules."""
    lost = sum(float(np.sum((found[name] - value) ** 2)) for name, value in wanted.items())
    return float(np.sqrt(lost / sum(float(np.sum(value**2)) for value in wanted.values())))


def run(
    rule: Rule, answers: Sequence[ClientAdapter], before: Combined, scale: float, now: Round = NOW
) -> Combined:
    """One round of any rule, as a server does it: sums for linear rules, single answers for the others."""
    if not rule.linear:
        return rule.combine(iter(answers), before, scale, now)
    total = WeightedMean()
    for answer in answers:
        total.add(
            {name: answer.tensors[name] for name in rule.sends(answer.tensors, now.number)}, answer.weight
        )
    return Combined(rule.from_mean(before.tensors, total.mean()))
