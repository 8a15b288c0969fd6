"""What says how much each expert has to say of a token: a score for each expert at each layer.

    arrow   |v x|, where v is the direction that an expert's product stretches most (Ostapenko et al. 2024,
            arXiv:2405.11157). Needs the adapters alone
    means   which expert's rows look most like what has come into the layer so far: linear discriminants of
    the experts'
            mean inputs, with one variance for all, averaged over the prefix. Needs what owners summed up once
    fixed   the same for every token: one expert, or a mixture

numpy and torch; the formulas are a layer's, the routers' work is in routers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedtune.aggregate import Pair
from fedtune.types import Tensors

FLOOR = 1e-3  # added to every variance: an input that never moves tells nothing


@dataclass(frozen=True)
class Gate:
    """Of one layer: scores of its inputs (..., in) -> (..., experts).

    weight, bias  of a linear map
    size          its absolute value counts: a direction has no sign
    of_prefix     scores are averaged over the tokens so far
    """

    weight: torch.Tensor
    bias: torch.Tensor
    size: bool = False
    of_prefix: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        score = x.to(self.weight.dtype) @ self.weight.T + self.bias
        return score.abs() if self.size else score


@dataclass
class Below:
    """Of one pass: each expert's scores, summed over the layers so far where it lives, and how many those
    are."""

    total: Any = None
    layers: Any = None

    def mean_with(self, scores: torch.Tensor, places: Sequence[int], count: int) -> torch.Tensor:
        """Scores (..., places) of a layer -> their mean with those below; `places` are numbers among `count`
        experts. Anew where a network goes on with other positions (a pooler's)."""
        if self.total is None or self.total.shape[:-1] != scores.shape[:-1]:
            self.total, self.layers = scores.new_zeros(*scores.shape[:-1], count), scores.new_zeros(count)
        here = torch.tensor(places, device=scores.device)
        self.total = self.total.index_add(-1, here, scores)
        self.layers = self.layers.index_add(0, here, scores.new_ones(len(places)))
        mean: torch.Tensor = (self.total / self.layers.clamp_min(1))[..., here]
        return mean


def arrow(pairs: Sequence[Pair | None], width: int) -> Gate:
    """From the experts' pairs at a layer; an expert without one has score 0."""
    rows = [np.zeros(width) if pair is None else direction(pair) for pair in pairs]
    return Gate(tensor(np.stack(rows)), torch.zeros(len(rows)), size=True)


def direction(pair: Pair) -> np.ndarray:
    """The first right singular vector of B A, for any rank, through an r x r matrix; zeros for a product of
    zeros."""
    q, r = np.linalg.qr(pair.A.astype(np.float64).T)  # A = r.T q.T
    _, sizes, vectors = np.linalg.svd(np.linalg.qr(pair.B.astype(np.float64))[1] @ r.T)
    found: np.ndarray = q @ vectors[0] if sizes[0] > 0 else np.zeros(pair.A.shape[1])
    return found


def means(moments: Sequence[np.ndarray]) -> Gate:
    """From (mean, mean square) of what comes into a layer, (2, in) for each expert."""
    mean = np.stack([one[0] for one in moments]).astype(np.float64)
    square = np.stack([one[1] for one in moments]).astype(np.float64)
    within = np.maximum(square - mean**2, 0).mean(0) + FLOOR
    weight = mean / within
    return Gate(tensor(weight), tensor(-0.5 * (mean * weight).sum(1)), of_prefix=True)


def fixed(shares: Sequence[float], width: int) -> Gate:
    """Shares of a mixture as scores, whose softmax they are."""
    logs = np.log(np.maximum(np.asarray(shares, np.float64), 1e-30))
    return Gate(torch.zeros(len(logs), width), tensor(logs))


def tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value, np.float32))


def as_tensors(gates: Mapping[str, Gate]) -> dict[str, np.ndarray]:
    """For a file."""
    return {
        f"{name}.{part}": value.detach().cpu().numpy()
        for name, gate in gates.items()
        for part, value in (("weight", gate.weight), ("bias", gate.bias))
    }


def from_tensors(tensors: Tensors, size: bool, of_prefix: bool) -> dict[str, Gate]:
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {
        name: Gate(tensor(tensors[f"{name}.weight"]), tensor(tensors[f"{name}.bias"]), size, of_prefix)
        for name in sorted(names)
    }
