"""Scalars of a walk, on a loss that can be done on paper: L = 3 + 2 a - b, where a and b say how far along
two directions the model stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedtune.methods.fedkseed_ways import Go, one_sided, two_sided


def model() -> tuple[list[float], Go]:
    at = [0.0, 0.0]

    def go(moves: Sequence[tuple[int, float]]) -> None:
        for k, far in moves:
            at[k] += far

    return at, go


def test_two_sided_differences_are_slopes_and_leave_the_way_back() -> None:
    at, go = model()
    loss, found, back = two_sided([0], 0.5, go, lambda: 3 + 2 * at[0] - at[1], [(1, 0.25)])
    assert (loss, found, back) == (2.75, [2.0], [0.5]) and at == [
        -0.5,
        0.25,
    ]  # after what was left of the step before


def test_one_sided_differences_are_divided_by_their_spread() -> None:
    """Losses 3, then 4 and 2.5 half a unit along each: differences 1 and -0.5, standard deviation 1.5 / root
    of 2."""
    at, go = model()
    loss, found, back = one_sided([0, 1], 0.5, go, lambda: 3 + 2 * at[0] - at[1], [])
    assert loss == 3 and at == [0.0, 0.5] and back == [0.0, -0.5]
    assert found == pytest.approx([2**0.5 / 1.5, -0.5 * 2**0.5 / 1.5])
    at, go = model()  # ten times as steep, the same scalars: what is steep gets no longer steps
    assert one_sided([0, 1], 0.5, go, lambda: 10 * (3 + 2 * at[0] - at[1]), [])[1] == pytest.approx(found)


def test_where_all_directions_lead_to_the_same_loss_no_step_is_made() -> None:
    _, go = model()
    assert one_sided([0, 1, 0], 0.5, go, lambda: 3.0, [])[1] == [0.0] * 3
    assert not np.isfinite(one_sided([0, 1], 0.5, go, lambda: float("nan"), [])[1]).any()
