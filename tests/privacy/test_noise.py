"""Noise is what it says, and no run's seed knows it."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedtune.privacy import noise
from fedtune.privacy.noise import Secret, accepts, add_gaussian, discrete_gaussian

FALSE_ALARM = (
    1e-6  # of a test of fit: the draws cannot be repeated, so the test must hardly ever fail by chance
)


@pytest.mark.parametrize("sigma", [1.0, 0.3, 3e-7, 1e6])
def test_gaussian_noise_is_normal(sigma: float) -> None:
    drawn = add_gaussian(np.full(200_000, 5 * sigma), sigma, Secret())
    assert stats.kstest(drawn / sigma - 5, "norm").pvalue > FALSE_ALARM
    away = np.abs(drawn / sigma - 5)
    assert away.max() < 8 and (away > 3).sum() == pytest.approx(540, abs=120)  # tails: 0.27 %


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.3, 60.0])
def test_the_discrete_gaussian_has_its_own_probabilities(sigma: float) -> None:
    """Against the sum of exp(-x^2 / 2 sigma^2), not against a rounded normal."""
    drawn = discrete_gaussian(4000, sigma, Secret())
    reach = math.ceil(12 * sigma)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    edges = stats.norm.ppf(np.linspace(0.05, 0.95, 10)) * sigma
    groups = np.searchsorted(edges, np.arange(-reach, reach + 1))
    wanted = np.bincount(groups, weights, 11) / weights.sum() * len(drawn)
    found = np.bincount(np.searchsorted(edges, drawn), minlength=11)
    there = wanted > 0
    assert stats.chisquare(found[there], wanted[there]).pvalue > FALSE_ALARM and not found[~there].any()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0, 2.5])
def test_a_coin_of_probability_exp(gamma: float) -> None:
    from fractions import Fraction

    secret = Secret()
    heads = sum(accepts(Fraction(gamma), secret) for _ in range(4000))
    assert stats.binomtest(heads, 4000, math.exp(-gamma)).pvalue > FALSE_ALARM


def test_yes_with_a_probability() -> None:
    secret = Secret()
    for probability in (0.0, 0.1, 1.0):
        heads = int(secret.happens(50_000, probability).sum())
        assert stats.binomtest(heads, 50_000, probability).pvalue > FALSE_ALARM


def test_below_is_even() -> None:
    secret = Secret()
    found = np.bincount([secret.below(5) for _ in range(5000)], minlength=5)
    assert len(found) == 5 and stats.chisquare(found).pvalue > FALSE_ALARM


def test_no_noise_is_no_change() -> None:
    value = np.random.default_rng(0).normal(size=1000)
    assert add_gaussian(value, 0.0, Secret()) is value


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 2), (70_000,)])
def test_every_number_gets_noise_whatever_the_shape(shape: tuple[int, ...]) -> None:
    noisy = add_gaussian(np.zeros(shape), 1.0, Secret())
    assert noisy.shape == shape and np.count_nonzero(noisy) == math.prod(shape)


def test_the_last_bits_say_nothing() -> None:
    """Two inputs leave outputs on the same grid, whatever bits they had themselves (Mironov 2012)."""
    step = 2.0**-31
    for value in (np.full(1000, 0.1), np.full(1000, math.pi * 1e-9)):
        noisy = add_gaussian(value, 1.0, Secret())
        assert (noisy / step == np.rint(noisy / step)).all()


def test_every_source_is_another() -> None:
    assert len({Secret().bytes(16) for _ in range(100)}) == 100


def test_noise_knows_no_seed() -> None:
    """Nothing that draws noise can be given one: no import of the run's draws, no generator of numpy's."""
    text = Path(noise.__file__).read_text(encoding="utf-8")
    imported = {
        name.name if isinstance(node, ast.Import) else f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert "secrets" in imported and not any("rng" in name or "random" in name for name in imported)
    assert ".random." not in text and "default_rng" not in text
