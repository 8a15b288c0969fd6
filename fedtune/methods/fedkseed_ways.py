"""How a walker's weights get from where a loss was taken to where the next one is: by moves in place, or
written anew from the first values, by a table (method.walk)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedtune.methods.fedkseed_settings import FedKSeedSettings
from fedtune.methods.integers import FRACTION, Scale

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel
    from fedtune.zeroth import Pool

Loss = Callable[[], float]
Go = Callable[[Sequence[tuple[int, float]]], None]  # moves (direction, how far)
Measured = tuple[
    float, list[float], list[float]
]  # loss, a scalar for each direction, how far to go back along each


class Way(Protocol):
    def measure(self, group: Sequence[int], loss: Loss) -> tuple[float, list[float]]:
        """The loss where the model stands, and a scalar for each direction."""

    def take(self, group: Sequence[int], scalars: Sequence[int]) -> None:
        """The step by these scalars, in units. The weights are there after the next `measure`, or `end`."""

    def end(self) -> None: ...


def way_of(
    tunable: TunableModel,
    pool: Pool,
    s: FedKSeedSettings,
    scale: Scale,
    by: Mapping[str, Any] | None,
    held: np.ndarray | None,
) -> Way:
    """As method.walk says: by moves with the curvature's factors `by` (none: 1), or by a table from the
    pool's accumulators `held` (none: 0)."""
    if s.walk == "table":
        held = np.zeros(pool.size, np.int64) if held is None else held
        return ByTable(tunable, pool, s, scale.replay(float(s.lr)), held)
    return ByMoves(tunable, pool, s, float(s.lr) * scale.unit, by)


class ByMoves:
    """Float32 weights, in place. A step's last moves go along with the next one's first: one pass over the
    weights less. Each move rounds, so a walk ends some roundings beside what everybody rebuilds."""

    def __init__(
        self, tunable: TunableModel, pool: Pool, s: FedKSeedSettings, step: float, by: Any = None
    ) -> None:
        """step: what a scalar of one unit moves a weight by."""
        from fedtune.zeroth import views, walk

        self.go: Go = partial(walk, views(tunable.named), pool, by=by)
        self.way, self.eps = one_sided if s.estimator == "fzoo" else two_sided, s.eps
        self.step = step
        self.left: list[tuple[int, float]] = []
        self.back: list[float] = []

    def measure(self, group: Sequence[int], loss: Loss) -> tuple[float, list[float]]:
        value, found, self.back = self.way(group, self.eps, self.go, loss, self.left)
        return value, found

    def take(self, group: Sequence[int], scalars: Sequence[int]) -> None:
        self.left = [(k, far - self.step * a) for k, far, a in zip(group, self.back, scalars, strict=True)]

    def end(self) -> None:
        self.go(self.left)


class ByTable:
    """Weights that are always RN(w0 + r T[h]) with T = RN(scale * S + far * H[k]), S = WHT(A): far is +-eps
    where a loss is taken, or 0. They have the type of w0 and end as what everybody rebuilds from A, to the
    bit."""

    def __init__(
        self, tunable: TunableModel, pool: Pool, s: FedKSeedSettings, scale: float, held: np.ndarray
    ) -> None:
        """held: the pool's accumulators A (K,) where the walk begins; scale: what 1 of them moves a weight
        by."""
        from fedtune.zeroth import Layout, views, write
        from fedtune.zeroth.pool import wht

        self.put = partial(
            write,
            views(tunable.named),
            pool,
            base=views(tunable.origin.tensors),
            layout=Layout.of(tunable.named),
        )
        self.two_sided, self.eps, self.scale = s.estimator != "fzoo", s.eps, scale
        self.size, self.sums = pool.size, wht(held.astype(np.int64))

    def measure(self, group: Sequence[int], loss: Loss) -> tuple[float, list[float]]:
        if self.two_sided:
            (k,) = group
            above, below = self.at(k, self.eps, loss), self.at(k, -self.eps, loss)
            return (above + below) / 2, [slope(above, below, self.eps)]
        start = self.at(0, 0.0, loss)
        return start, by_spread(start, [self.at(k, self.eps, loss) for k in group])

    def take(self, group: Sequence[int], scalars: Sequence[int]) -> None:
        for k, a in zip(group, scalars, strict=True):
            self.sums += (int(a) << FRACTION) * self.row(k).astype(np.int64)

    def end(self) -> None:
        self.at(0, 0.0, lambda: 0.0)

    def at(self, k: int, far: float, loss: Loss) -> float:
        """The loss of a model that stands `far` along direction k from here."""
        self.put((self.scale * self.sums.astype(np.float64) + far * self.row(k)).astype(np.float32))
        return loss()

    def row(self, k: int) -> np.ndarray:
        from fedtune.zeroth.pool import hadamard_row

        return hadamard_row(self.size, k)


def two_sided(
    group: Sequence[int], eps: float, go: Go, loss: Loss, left: Sequence[tuple[int, float]]
) -> Measured:
    """g = (L(w + eps z) - L(w - eps z)) / 2 eps (Spall 1992; MeZO, Malladi et al. 2023, alg. 1)."""
    (k,) = group
    go([*left, (k, eps)])
    above = loss()
    go([(k, -2 * eps)])
    below = loss()
    return (above + below) / 2, [slope(above, below, eps)], [eps]


def one_sided(
    group: Sequence[int], eps: float, go: Go, loss: Loss, left: Sequence[tuple[int, float]]
) -> Measured:
    """g_i = (L(w + eps z_i) - L(w)) / s, with s the standard deviation of the L(w + eps z_i) (FZOO,
    arXiv:2506.09034): the flatter, the longer a step.

    N + 1 losses give N scalars. The mean over the group is left to the learning rate.
    """
    go(left)
    start, sides = loss(), []
    for k, before in zip(group, [None, *group[:-1]], strict=True):
        go([(k, eps)] if before is None else [(before, -eps), (k, eps)])
        sides.append(loss())
    return start, by_spread(start, sides), [0.0] * (len(group) - 1) + [-eps]


def slope(above: float, below: float, eps: float) -> float:
    return (above - below) / (2 * eps)


def by_spread(start: float, sides: Sequence[float]) -> list[float]:
    spread = float(np.std(sides, ddof=1))
    return [(side - start) / spread if spread else 0.0 for side in sides]
