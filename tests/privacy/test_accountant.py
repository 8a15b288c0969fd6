"""Epsilon is dp-accounting's own; what is not known is never taken for nothing."""

from __future__ import annotations

import math
import sys

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from fedtune.errors import FedtuneError
from fedtune.privacy.accountant import spent
from fedtune.privacy.releases import Release
from tests.marks import mostly_thorough

DELTA = 1e-5
# rate, noise, steps
SETTINGS = [(0.01, 1.0, 1000), (0.1, 2.0, 100), (1.0, 5.0, 50)]


@pytest.mark.parametrize(("rate", "noise", "steps"), mostly_thorough(SETTINGS, [(1.0, 5.0, 50)]))
def test_epsilon_is_dp_accountings_own(rate: float, noise: float, steps: int) -> None:
    """Composed here step by step and out of unequal pieces, there in one release."""
    gaussian = dp_accounting.GaussianDpEvent(noise)
    whole = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian, steps
    )
    by_renyi, by_losses = rdp.RdpAccountant(), pld.PLDAccountant()
    by_renyi.compose(whole)
    by_losses.compose(whole)
    kind = "poisson-gaussian" if rate < 1 else "gaussian"
    pieces = [
        Release(kind, "example", noise, rate, count) for count in (1, steps // 2, steps - steps // 2 - 1)
    ]
    found = spent(pieces, DELTA)
    assert found.renyi == pytest.approx(by_renyi.get_epsilon(DELTA), abs=1e-3)
    assert found.losses == pytest.approx(by_losses.get_epsilon(DELTA), abs=1e-3)
    assert found.epsilon == min(found.renyi, found.losses) == found.losses


def test_a_known_number() -> None:
    """q = 0.01, sigma = 1, 1000 steps, delta = 1e-5: 2.1014 by Renyi divergences, as Opacus says it too."""
    found = spent([Release("poisson-gaussian", "example", 1.0, 0.01, 1000)], DELTA)
    assert (round(found.renyi, 4), round(found.losses, 4)) == (2.1014, 1.8282)


def test_the_gaussian_mechanism_in_closed_form() -> None:
    """One Gaussian of noise s: delta = Phi(1/2s - e s) - exp(e) Phi(-1/2s - e s) (Balle and Wang 2018)."""
    found = spent([Release("gaussian", "client", 2.0)], DELTA).losses

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = phi(0.25 - 2 * found) - math.exp(found) * phi(-0.25 - 2 * found)
    assert delta == pytest.approx(DELTA, rel=2e-3)


def test_the_discrete_gaussian_is_counted_by_renyi_alone() -> None:
    found = spent([Release("discrete-gaussian", "client", 5.0, count=50)], DELTA)
    assert found.epsilon == found.renyi == spent([Release("gaussian", "client", 5.0, count=50)], DELTA).renyi
    assert math.isnan(found.losses)


def test_nothing_costs_nothing() -> None:
    assert spent([], DELTA).epsilon == 0.0


@pytest.mark.parametrize("odd", ["laplace-7", "unreadable"])
def test_an_unknown_event_is_said(odd: str) -> None:
    found = spent([Release("gaussian", "client", 2.0), Release(odd, "client", 1.0)], DELTA)
    assert math.isnan(found.epsilon) and f"epsilon unknown: a release '{odd}'" in str(found)


@pytest.mark.parametrize("release", [Release("none", "client"), Release("gaussian", "client", 0.0)])
def test_no_noise_has_no_epsilon(release: Release) -> None:
    assert "unbounded" in str(found := spent([release], DELTA)) and math.isinf(found.epsilon)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"mechanism": "gaussian"}',
        '{"mechanism": "gaussian", "unit": "client", "later": 1}',
        '{"mechanism": "gaussian", "unit": "client", "noise": -1.0}',
        '{"mechanism": "gaussian", "unit": "client", "noise": "x"}',
        '{"mechanism": "gaussian", "unit": "client", "noise": 1.0, "count": 0}',
        '{"mechanism": "poisson-gaussian", "unit": "example", "noise": 1.0, "rate": 0.0}',
    ],
)
def test_a_line_that_cannot_be_read_is_no_free_line(text: str) -> None:
    assert not Release.read(text).known


def test_events_are_read_as_they_were_written() -> None:
    release = Release("poisson-gaussian", "example", 1.1, 0.02, 7)
    assert Release.read(release.text()) == release


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(FedtuneError, match=r"pip install 'fedtune\[privacy\]'") as caught:
        spent([Release("gaussian", "client", 3.25)], DELTA)
    assert caught.value.code == "P901"
