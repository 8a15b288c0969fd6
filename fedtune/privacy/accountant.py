"""Epsilon of what a ledger says, by dp-accounting: Renyi divergences (Mironov 2017, arXiv:1702.07476) and
privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, arXiv:2207.04380).

Both are upper bounds of the same epsilon; the smaller one holds. A release that nobody here knows makes
epsilon unknown: it is never left out of a sum.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.privacy.releases import Release

INSTALL = "run: pip install 'fedtune[privacy]'"


@dataclass(frozen=True)
class Spent:
    """What was given away so far, at one delta.

    renyi, losses  epsilon by the two ways to count; inf where something went out without noise, nan where it
                   is unknown or cannot be counted this way
    unknown        mechanisms that this version does not know
    """

    delta: float
    renyi: float = 0.0
    losses: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def epsilon(self) -> float:
        """The smaller bound; inf where there is none, nan where it is unknown."""
        if self.unknown:
            return math.nan
        return min((bound for bound in (self.renyi, self.losses) if not math.isnan(bound)), default=math.nan)

    def __str__(self) -> str:
        if self.unknown:
            return f"epsilon unknown: a release '{self.unknown[0]}', which this version cannot count"
        if math.isinf(self.epsilon):
            return "epsilon unbounded: something is shown without noise"
        return f"epsilon {self.epsilon:.2f} at delta {self.delta:g}"


def spent(releases: Iterable[Release], delta: float) -> Spent:
    """What these releases of one client or row come to together. Raises P901 without dp-accounting."""
    counts = counted(releases)
    if odd := tuple(sorted({release.mechanism for release in counts if not release.known})):
        return Spent(delta, math.nan, math.nan, odd)
    if any(not release.bounded for release in counts):
        return Spent(delta, math.inf, math.inf)
    return composed(frozenset(counts.items()), delta) if counts else Spent(delta)


def counted(releases: Iterable[Release]) -> Counter[Release]:
    """How often each was made."""
    counts = Counter[Release]()
    for release in releases:
        counts[Release(release.mechanism, release.unit, release.noise, release.rate)] += release.count
    return counts


@lru_cache(512)
def composed(counts: frozenset[tuple[Release, int]], delta: float) -> Spent:
    """Epsilon of known releases, each as often as it says."""
    # of the discrete Gaussian in many dimensions only the Renyi divergence is known, that of the Gaussian
    # (Canonne et al. 2020, theorem 4)
    exact = all(release.mechanism != "discrete-gaussian" for release, _ in counts)
    losses = math.nan
    if exact:
        accountant = library().pld.PLDAccountant()
        with quiet_absl():
            for event in events(counts):
                accountant.compose(event)
            losses = float(accountant.get_epsilon(delta))
    return Spent(delta, by_renyi(counts, delta), losses)


@lru_cache(2048)
def by_renyi(counts: frozenset[tuple[Release, int]], delta: float) -> float:
    """The bound by Renyi divergences alone: it takes milliseconds where the other takes up to a second."""
    accountant = library().rdp.RdpAccountant()
    with quiet_absl():
        for event in events(counts):
            accountant.compose(event)
        return float(accountant.get_epsilon(delta))


def events(counts: Iterable[tuple[Release, int]]) -> Iterator[Any]:
    """Known releases in dp-accounting's words, in an order that is always the same."""
    dp = library()
    for release, count in sorted(counts, key=lambda pair: pair[0].text()):
        gaussian = dp.GaussianDpEvent(release.noise)
        one = dp.PoissonSampledDpEvent(release.rate, gaussian) if release.rate < 1 else gaussian
        yield dp.SelfComposedDpEvent(one, count)


def library() -> Any:
    """dp-accounting, with its two accountants. Raises P901."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise FedtuneError(
            "P901", sentence="dp-accounting, which counts epsilon, is not installed", do=INSTALL
        ) from None
    return dp_accounting


@contextmanager
def quiet_absl() -> Iterator[None]:
    """Without dp-accounting's warnings of orders that it leaves out, which cost nothing but tightness."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
