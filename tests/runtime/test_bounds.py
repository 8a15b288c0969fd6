"""What the server takes for an answer: each bound with the number just inside and just outside of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.errors import Refused
from fedtune.runtime.bounds import LARGEST, Bounds, norm_of, too_large, within
from fedtune.types import Tensors, Update

GIVEN: Tensors = {"w": np.zeros(2, np.float32)}


def update(norm: float, weight: float = 2.0, loss: float = 1.0) -> Update:
    return Update.of({"w": np.float32([norm, 0.0])}, weight, {"loss": loss})


def test_the_limit_follows_the_median_of_earlier_rounds() -> None:
    bounds, given = Bounds(), {"w": np.zeros(2, np.float32)}
    for number, norms in enumerate([(1.0, 2.0, 99.0), (0.01, 0.02, 0.03), (3.0, 4.0, 199.0)], 1):
        for client, norm in enumerate(norms):
            bounds.check(number, client, "site", "train", update(norm), given, 100.0)
    with pytest.raises(Refused, match="W606: found an answer of norm 401 from 'site', expected at most 400"):
        bounds.check(4, 0, "site", "train", update(401.0), given, 100.0)
    bounds.check(4, 0, "site", "train", update(401.0), given, 0.0)  # limits.spread = 0
    with pytest.raises(Refused, match="W607: found 'loss' = 1001 from 'site'"):
        bounds.check(4, 0, "site", "train", update(1.0, loss=1001.0), given, 100.0)
    for odd in (float("nan"), float("inf"), 1e300):
        with pytest.raises(Refused, match="W607"):
            bounds.check(4, 0, "site", "train", update(1.0, loss=odd), given, 100.0)


@pytest.mark.parametrize("weight", [1.0, 1e9, 1e299])
def test_finite_is_not_enough(weight: float) -> None:
    for value in (3e38, -3e38, 1.1e12, float("nan"), float("inf")):
        with np.errstate(over="ignore"):
            assert too_large({"a": np.zeros(1), "b": np.float64([value]) * weight}, weight) == "b"
    assert (
        too_large(
            {"a": np.float64([9e11, -9e11]) * min(weight, 1e9), "n": np.int64([1 << 60])}, min(weight, 1e9)
        )
        == ""
    )


def test_a_norm_is_of_the_mean_over_all_tensors_and_whole_numbers_have_none() -> None:
    both = {"a": np.float64([[6.0, 0.0]]), "b": np.float64([8.0])}
    assert norm_of(Update(both, 2.0)) == 5.0
    assert norm_of(Update({**both, "n": np.int64([1])}, 2.0)) is None and norm_of(Update({}, 2.0)) is None


@pytest.mark.parametrize(("given", "limit"), [(0.0, 10.0), (0.5, 10.0), (3.0, 30.0)])
def test_in_the_first_round_the_limit_follows_what_was_given(given: float, limit: float) -> None:
    state = {"w": np.float32([0.0, given]), "mask": np.uint32([1 << 30])}  # bits have no length
    Bounds().check(1, 0, "site", "train", update(limit), state, 10.0)
    with pytest.raises(Refused, match="W606"):
        Bounds().check(1, 0, "site", "train", update(limit + 1), state, 10.0)


def test_answers_of_one_round_do_not_raise_its_own_limit_and_verbs_are_apart() -> None:
    bounds = Bounds()
    for client in range(3):
        bounds.check(1, client, "site", "train", update(9.0), GIVEN, 10.0)
    with pytest.raises(Refused, match="W606"):
        bounds.check(1, 3, "site", "train", update(11.0), GIVEN, 10.0)
    bounds.check(2, 0, "site", "train", update(89.0), GIVEN, 10.0)
    with pytest.raises(Refused, match="W606"):
        bounds.check(2, 0, "site", "other", update(89.0), GIVEN, 10.0)
    with pytest.raises(
        Refused, match="W606"
    ):  # a client of another rank has other tensors, and a norm of its own
        bounds.check(2, 0, "site", "train", Update.of({"v": np.float32([89.0])}, 1.0), GIVEN, 10.0)


def test_a_refused_answer_teaches_nothing() -> None:
    bounds = Bounds()
    bounds.check(1, 0, "site", "train", update(1.0), GIVEN, 10.0)
    for client in (1, 2):
        with pytest.raises(Refused):
            bounds.check(1, client, "site", "train", update(1e6), GIVEN, 10.0)
    with pytest.raises(Refused, match="expected at most 10;"):
        bounds.check(2, 1, "site", "train", update(11.0), GIVEN, 10.0)


def test_figures_may_be_large_until_the_others_say_what_is_usual() -> None:
    def said(loss: float, *, verb: str = "train", number: int = 2) -> None:
        bounds.check(number, 1, "site", verb, update(1.0, loss=loss), GIVEN, 0.0)

    for usual, most in ((0.5, 500.0), (0.001, 10.0)):  # a thousand times the median; below 10 nothing is odd
        bounds = Bounds()
        for client in range(3):
            bounds.check(1, client, "site", "train", update(1.0, loss=usual), GIVEN, 0.0)
        said(most * 0.999)
        with pytest.raises(Refused, match=r"W607: found 'loss' = .* from 'site', expected about"):
            said(most * 1.001)
        said(-most * 0.999)
        with pytest.raises(Refused, match="W607"):
            said(-most * 1.001)
        said(most * 1.001, verb="other")
    bounds = Bounds()
    said(LARGEST * 0.999, number=1)
    with pytest.raises(Refused, match="W607"):
        said(LARGEST * 1.001, number=1)


def test_a_weight_is_at_most_what_was_declared() -> None:
    asked: list[tuple[int, str]] = []

    def most(client: int, verb: str) -> float:
        asked.append((client, verb))
        return 12.0

    bounds = Bounds(most)
    bounds.check(1, 7, "site", "train", update(1.0, weight=12.0), GIVEN, 0.0)
    with pytest.raises(Refused, match=r"W606: found weight 12.5 of 'site', expected at most 12"):
        bounds.check(1, 7, "site", "train", update(1.0, weight=12.5), GIVEN, 0.0)
    assert asked == [(7, "train")] * 2
    Bounds().check(1, 7, "site", "train", update(1.0, weight=1e30), GIVEN, 0.0)


def test_the_largest_value_is_allowed_on_either_side_and_no_nan_is() -> None:
    for most in (1.0, 1e155):  # of which the square is finite, and not
        assert within(np.array([most, -most, 0.5]), most)
        for odd in (most * 1.001, -most * 1.001, math.nan, math.inf):
            assert not within(np.array([0.5, odd]), most)
    assert too_large({"n": np.int64([1 << 62]), "e": np.zeros(0), "a": np.float64([1.0])}, 1.0) == ""
    assert (
        too_large({"x": np.float64([2 * LARGEST])}, 2.0)
        == ""
        != too_large({"x": np.float64([2.1 * LARGEST])}, 2.0)
    )
