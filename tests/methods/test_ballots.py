"""Ballots: what is read from a sum of packed ones is what counting by hand finds."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.methods.ballots import counted, elected, most_of, packed, width_for, words_for


@pytest.mark.parametrize("members", [1, 2, 3, 7, 8, 200, 5000])
@pytest.mark.parametrize("count", [1, 51, 52, 53, 1000])
def test_a_sum_of_ballots_is_the_votes_of_every_position(members: int, count: int) -> None:
    draw, width = np.random.default_rng(members), width_for(members)
    some = [draw.permutation(count)[: max(1, count // 3)] for _ in range(min(members, 9))]
    ballots = [packed(positions, count, width) for positions in some]
    assert {ballot.shape for ballot in ballots} == {(words_for(count, width),)}
    assert max(int(ballot.max()) for ballot in ballots) <= most_of(width) < 1 << 53
    wanted = np.zeros(count, int)
    for positions in some:
        wanted[positions] += 1
    assert counted(np.sum(ballots, axis=0), count, width).tolist() == wanted.tolist()


def test_everybody_may_vote_for_the_same_position() -> None:
    ballot = packed(np.arange(100), 100, width_for(63))
    assert counted(63 * ballot, 100, width_for(63)).tolist() == [63] * 100


def test_the_most_votes_win_and_ties_are_not_settled_by_place() -> None:
    votes = np.array([0, 3, 1, 1, 2, 1, 1, 0, 1, 1])
    assert elected(votes, least=2, most=5).tolist() == [1, 4]
    assert elected(votes, least=4, most=5).tolist() == []
    won = elected(votes, least=1, most=5)
    assert won.size == 5 and {1, 4} < set(won.tolist()) and np.all(np.diff(won) > 0) and votes[won].all()
    assert won.tolist() == elected(votes, least=1, most=5).tolist()
    many = elected(np.ones(1000, int), least=1, most=100)
    assert 300 < many.mean() < 700  # by place it would be 49.5
