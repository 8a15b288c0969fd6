"""FedKSeed's whole-number arithmetic, against fractions and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.methods import integers


@pytest.mark.parametrize(
    ("clip", "unit", "top"),
    [(100.0, 2**-8, 25600), (1.0, 2**-14, 16384), (32000.0, 1.0, 32000), (32767 / 2**8, 2**-8, 32767)],
)
def test_the_unit_is_the_finest_power_of_two_that_fits_the_clip(clip: float, unit: float, top: int) -> None:
    assert integers.Scale.of(clip, 16) == integers.Scale(unit, top)
    assert top <= 32767 < 2 * clip / unit


def test_a_scalar_is_rounded_clipped_or_dropped() -> None:
    scale = integers.Scale.of(100.0, 16)
    assert (
        scale.whole(1.0, False) == 256
        and scale.whole(-0.5 / 256, False) == 0
        and scale.whole(1.5 / 256, False) == 2
    )
    assert scale.whole(1e9, False) == 25600 == -scale.whole(-math.inf, False)
    assert scale.whole(1e9, True) == 0 and scale.whole(100.0, True) == 25600
    sign = integers.Scale.of(100.0, 1)
    assert [sign.whole(g, False) for g in (3e-9, 0.0, -1e9)] == [1, -1, -1]


@settings(max_examples=200)
@given(st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=5), st.integers(1, 2**40))
def test_a_mean_is_the_fraction_rounded_half_to_even(totals: list[int], weight: int) -> None:
    got = integers.mean(np.int64(totals), weight)
    assert got.tolist() == [round(Fraction(total * 256, weight)) for total in totals]


def test_k_equal_answers_have_their_own_mean() -> None:
    answer = np.int64([3, -7, 25600])
    assert integers.mean(5 * 17 * answer, 5 * 17).tolist() == (256 * answer).tolist()
    assert integers.mean(np.int64([1, -1, 3]), 512).tolist() == [0, 0, 2]  # halves go to the even neighbour


def test_accumulators_travel_as_int32_until_one_does_not_fit() -> None:
    assert integers.narrow(np.int64([2**31 - 1, -5])).dtype == np.int32
    assert integers.narrow(np.int64([2**31, -5])).dtype == np.int64
    assert integers.narrow(np.int64([2**31, -5])).tolist() == [2**31, -5]


def test_server_and_client_draw_the_same_seeds_and_clients_others() -> None:
    one = integers.draw(4096, 200, (1, 3, 5))
    assert (
        one.tolist()
        == integers.draw(4096, 200, (1, 3, 5)).tolist()
        != integers.draw(4096, 200, (1, 3, 6)).tolist()
    )
    assert len(one) == 200 and one.min() >= 0 and one.max() < 4096
    many = np.bincount(integers.draw(64, 64000, (1, 1, 1)), minlength=64)
    assert abs(many - 1000).max() < 5 * math.sqrt(1000)


def test_importance_draws_the_largest_at_most_e_times_as_often_as_the_smallest() -> None:
    levels = integers.importance(
        np.int64([0, 30, 30, 40]), np.int64([0, 1, 2, 0])
    )  # means with one 0 in front: 0, 15, 10, 40
    assert levels.tolist() == [0, 96, 64, 255]
    drawn = np.bincount(integers.draw(4, 100_000, (7, 1, 1), levels), minlength=4) / 100_000
    want = np.exp(levels / 255) / np.exp(levels / 255).sum()
    np.testing.assert_allclose(drawn, want, atol=0.01)
    assert integers.importance(np.int64([0, 0]), np.int64([0, 0])).tolist() == [0, 0]
    exact = integers.exponentials()
    assert exact[0] == 65536 and exact[255] == math.floor(65536 * math.e) and (np.diff(exact) > 0).all()


def test_the_fingerprint_follows_from_everything() -> None:
    pools = {"pool-0000": np.int32([1, 2])}
    base = integers.fingerprint(b"a" * 32, {"lr": 1e-5}, pools)
    assert base.dtype == np.uint8 and base.shape == (32,)
    others = [
        (b"b" * 32, {"lr": 1e-5}, pools),
        (b"a" * 32, {"lr": 2e-5}, pools),
        (b"a" * 32, {"lr": 1e-5}, {"pool-0000": np.int32([1, 3])}),
    ]
    for start, facts, tensors in others:
        assert integers.fingerprint(start, facts, tensors).tobytes() != base.tobytes()
