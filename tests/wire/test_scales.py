"""Scales on the wire: eleven bits at every magnitude, and rounding twice changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.wire.scales import rounded, to_halves


@pytest.mark.parametrize("exponent", range(-120, 121, 15))
def test_a_scale_keeps_eleven_bits_at_every_magnitude(exponent: int) -> None:
    scale = math.ldexp(math.pi / 3, exponent)
    (there,) = rounded({"a": scale}).values()
    assert abs(float(there) - scale) <= 2**-11 * scale
    assert rounded({"a": there})["a"] == there
    halves, shared = to_halves(there.reshape(1))
    assert float(halves[0]) * 2.0**shared == float(there)


@pytest.mark.parametrize("exponent", [-40, 0, 9, 40])
def test_a_scale_that_rounds_up_to_the_next_power_of_two_is_of_the_next_exponent(exponent: int) -> None:
    (there,) = rounded({"a": math.nextafter(2.0**exponent, 0)}).values()
    assert there == 2.0**exponent and rounded({"a": there})["a"] == there
    halves, shared = to_halves(there.reshape(1))
    assert float(halves[0]) == 2.0**14 and shared == exponent - 14


def test_scales_of_one_message_share_the_exponent_of_the_largest() -> None:
    there = rounded({"large": 3.0, "small": np.float64([3.0 * 2**-20, 3.0 * 2**-50])})
    assert there["large"] == 3.0 and there["small"].tolist() == [3.0 * 2**-20, 0.0]


def test_nothing_and_zeros_stay_what_they_are() -> None:
    assert rounded({}) == {} and rounded({"a": 0.0})["a"] == 0
    assert rounded({"a": np.zeros(0)})["a"].shape == (0,)


@pytest.mark.parametrize("scale", [1e39, math.inf, math.nan])
def test_a_scale_beyond_float32_is_refused(scale: float) -> None:
    with pytest.raises(OverflowError):
        rounded({"a": scale})


def test_scales_that_were_not_rounded_are_refused() -> None:
    with pytest.raises(ValueError, match="rounded"):
        to_halves(np.float32([math.pi]))
