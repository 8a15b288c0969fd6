"""An adapter at another rank and scale: what a client of fewer ranks is given."""

from __future__ import annotations

import math

import numpy as np

from fedtune.aggregate.gather import away
from fedtune.aggregate.pairs import Pair, join, split
from fedtune.aggregate.product import balanced, inner, ratio, rows, spectrum
from fedtune.errors import FedtuneError
from fedtune.types import Tensors


def for_rank(tensors: Tensors, scale: float, rank: int, client_scale: float) -> dict[str, np.ndarray]:
    """The best adapter of this rank: truncated SVD through the small core.

    Where rank and scale are equal already the very tensors; where only the rank is, the very A. Raises C102
    for a rank below 1.
    """
    at_least_one(rank)
    pairs, rest = split(tensors)
    made: dict[str, Pair] = {}
    for name, pair in pairs.items():
        if pair.rank == rank:
            made[name] = scaled(pair, scale, client_scale)
        else:
            of = spectrum(Pair(np.multiply(pair.B, scale, dtype=np.float64), pair.A))
            made[name] = balanced(of, rank, client_scale, name, pair.A)
    return join(made, rest)


def first_slices(tensors: Tensors, scale: float, rank: int, client_scale: float) -> dict[str, np.ndarray]:
    """The first `rank` slices, so that a slice means the same for all (HetLoRA's truncation); more slices
    start as LoRA does."""
    at_least_one(rank)
    pairs, rest = split(tensors)
    made: dict[str, Pair] = {}
    for name, pair in pairs.items():
        count = min(rank, pair.rank)
        b = np.zeros((pair.B.shape[0], rank), dtype=pair.B.dtype)
        b[:, :count] = pair.B[:, :count]
        a = (
            np.concatenate([pair.A[:count], rows(name, pair.A, count, rank)], axis=0)
            if rank > count
            else pair.A[:count]
        )
        made[name] = scaled(Pair(b, a), scale, client_scale)
    return join(made, rest)


def left_out(tensors: Tensors, scale: float, given: Tensors, client_scale: float) -> float:
    """||B A - B' A'||_F / ||B A||_F over all modules, scales inside: what an adapter of another rank does not
    hold. Blind below 1e-8."""
    lost = whole = 0.0
    others = split(given)[0]
    for name, pair in split(tensors)[0].items():
        full = Pair(np.multiply(pair.B, scale, dtype=np.float64), np.asarray(pair.A, dtype=np.float64))
        square = inner(full, full)
        lost, whole = lost + away(full, square, others[name], client_scale) ** 2, whole + square
    return ratio(math.sqrt(lost), math.sqrt(max(0.0, whole)))


def scaled(pair: Pair, scale: float, client_scale: float) -> Pair:
    return (
        pair
        if scale == client_scale
        else Pair(np.multiply(pair.B, scale / client_scale, dtype=np.float64), pair.A)
    )


def at_least_one(rank: int) -> None:
    if rank < 1:
        raise FedtuneError("C102", f"rank {rank}", "1 or more", "give the client a higher rank")
