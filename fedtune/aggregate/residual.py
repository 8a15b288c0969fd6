"""What stands beside an adapter as extra rank, and how adapter and residual become one stock adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.aggregate.answer import Combined
from fedtune.aggregate.pairs import Pair, join, split
from fedtune.aggregate.product import balanced, beyond, ratio, spectrum
from fedtune.errors import FedtuneError


def compact(parts: Sequence[Pair], limit: int = 0) -> tuple[Pair, float]:
    """The sum of products as one float32 pair of its numerical rank, or of `limit` at most, and the norm of
    what that leaves out."""
    of = spectrum(
        Pair(
            np.concatenate([part.B for part in parts], axis=1),
            np.concatenate([part.A for part in parts], axis=0),
        )
    )
    rank = min(limit, of.S.size) if limit else of.S.size
    root = np.sqrt(of.S[:rank])
    return Pair(
        (of.U[:, :rank] * root).astype(np.float32), (root[:, None] * of.Vt[:rank]).astype(np.float32)
    ), beyond(of, rank)


def summary(residual: Mapping[str, Pair]) -> dict[str, float]:
    return {"residual_rank": float(max((pair.rank for pair in residual.values()), default=0))}


def as_adapter(
    combined: Combined, scale: float, rank: int = 0, out_scale: float = 1.0
) -> tuple[dict[str, np.ndarray], int, float]:
    """Adapter and residual as one stock adapter: its tensors, its rank, the relative error over all modules.

    rank 0 concatenates, which is exact: every module gets the greatest rank that one needs, the others zeros.
    Otherwise the best adapter of that rank. `scale` is that of `combined`, `out_scale` that of the result.
    Raises C102 for a rank below 0.
    """
    if rank < 0:
        raise FedtuneError("C102", f"rank {rank}", "0 for concatenation, or 1 or more", "choose another rank")
    pairs, rest = split(combined.tensors)
    whole = {
        name: beside(pair, scale / out_scale, combined.residual.get(name), out_scale)
        for name, pair in pairs.items()
    }
    if not rank:
        wide = max((pair.rank for pair in whole.values()), default=0)
        return join({name: widened(pair, wide) for name, pair in whole.items()}, rest), wide, 0.0
    cut, _, error = narrowed(whole, rank)
    return join(cut, rest), rank, error


def narrowed(whole: Mapping[str, Pair], rank: int) -> tuple[dict[str, Pair], dict[str, float], float]:
    """The best pairs of this rank, and what that loses of the products: by module and over all of them,
    relative."""
    cut, layers, lost, total = dict[str, Pair](), dict[str, float](), 0.0, 0.0
    for name, pair in whole.items():
        of = spectrum(pair)
        cut[name] = balanced(of, rank, 1.0, name, pair.A)
        layers[name] = ratio(beyond(of, rank), float(np.linalg.norm(of.S)))
        lost, total = lost + beyond(of, rank) ** 2, total + float(of.S @ of.S)
    return cut, layers, ratio(math.sqrt(lost), math.sqrt(total))


def beside(pair: Pair, times: float, residual: Pair | None, out_scale: float) -> Pair:
    """Factors whose product, times `out_scale`, is adapter plus residual."""
    b, a = pair.B * np.float64(times), np.asarray(pair.A, dtype=np.float64)
    if residual is None or not residual.rank:
        return Pair(b, a)
    return Pair(
        np.concatenate([b, residual.B / np.float64(out_scale)], axis=1),
        np.concatenate([a, residual.A], axis=0),
    )


def widened(pair: Pair, rank: int) -> Pair:
    """The same product at a greater rank."""
    more = rank - pair.rank
    return Pair(np.pad(pair.B, ((0, 0), (0, more))), np.pad(pair.A, ((0, more), (0, 0))))
