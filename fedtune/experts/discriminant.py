"""A gate from sums: linear discriminants, with one full covariance, of everything that comes into a network's
layers.

What a text looks like at a token is a vector of all layers' inputs, each at mean square 1 and averaged over
the prefix (fedtune/model/prefix_sums.py), folded to `width` numbers by a count sketch, whose buckets and
signs all draw alike from the run's seed. Groups tell their mean and their mean of products; then

    s_k(x) = (mu_k - mu) C^-1 (x - (mu_k + mu) / 2) / TEMPER,    C the covariance within groups

up to a number that is alike for all k. A sketch is a linear map, so that the result is a linear gate at each
layer, whose scores add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.rng import stream
from fedtune.types import Tensors

MEAN, PRODUCTS = "mean", "products"  # of an answer: (width,) and (width (width + 1) / 2,)
SHRINK = 0.1  # of the covariance between two numbers: there are more numbers than texts
TEMPER = 3.0  # such discriminants are too sure; measured on held-out rows, docs/experts.md
FLOOR = 1e-6  # of the mean variance: of numbers that never move
Fold = tuple[np.ndarray, np.ndarray]  # of a layer: the bucket and the sign (1 or -1) of each number


def folds(widths: Mapping[str, int], width: int, seed: int) -> dict[str, Fold]:
    """Of layers, by how wide what comes in is; without collisions where all fit."""
    sizes, start, made = dict(sorted(widths.items())), 0, dict[str, Fold]()
    fits = sum(sizes.values()) <= width
    for layer, size in sizes.items():
        if fits:
            made[layer] = np.arange(start, start + size), np.ones(size, np.float32)
            start += size
        else:
            draw = stream(f"experts fold {layer}", seed)
            buckets = draw.integers(0, width, size)
            made[layer] = buckets, (draw.integers(0, 2, size) * 2 - 1).astype(np.float32)
    return made


def packed(width: int) -> int:
    """Numbers in the upper triangle of a symmetric matrix."""
    return width * (width + 1) // 2


def discriminants(
    said: Mapping[str, Tensors], weights: Mapping[str, float], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(K, width) and (K,), float64: of groups' MEAN and PRODUCTS, which count by weight. A group that has
    told nothing is like all together."""
    total = sum(weights[name] for name in sorted(said))
    means = {name: said[name][MEAN].astype(np.float64) for name in sorted(said)}
    width = len(next(iter(means.values())))
    middle, products, between = np.zeros(width), np.zeros(packed(width)), np.zeros((width, width))
    for name, mean in means.items():
        share = weights[name] / total
        middle += share * mean
        products += share * said[name][PRODUCTS].astype(np.float64)
        between += share * np.outer(mean, mean)
    within = np.zeros((width, width))
    within[np.triu_indices(width)] = products
    within = within + np.triu(within, 1).T - between
    spread = np.maximum(np.diag(within), 0) + FLOOR * max(float(np.trace(within)) / width, FLOOR)
    covariance = (1 - SHRINK) * within
    np.fill_diagonal(covariance, spread)
    apart = np.stack([means.get(name, middle) - middle for name in names])
    rows: np.ndarray = np.linalg.solve(covariance, apart.T).T
    bias = -0.5 * (rows * apart).sum(1) - rows @ middle
    return (rows - rows.mean(0)) / TEMPER, (bias - bias.mean()) / TEMPER


def unfolded(rows: np.ndarray, bias: np.ndarray, of: Mapping[str, Fold]) -> dict[str, np.ndarray]:
    """<layer>.weight (K, in) and <layer>.bias (K,), float32: what the rows say of each layer's own numbers.
    The bias is shared out evenly."""
    made = dict[str, np.ndarray]()
    for layer, (buckets, signs) in of.items():
        made[f"{layer}.weight"] = (rows[:, buckets] * signs).astype(np.float32)
        made[f"{layer}.bias"] = (bias / len(of)).astype(np.float32)
    return made
