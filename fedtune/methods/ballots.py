"""Votes for positions, which can be added without anybody reading a single one.

A ballot is a bit for each of N positions. As it travels, `SLOTS // width` positions share one whole number,
with `width` bits each, so many that the votes of all members fit: what adds up the numbers adds up the votes
of every position, also modulo 2**64 under a mask. It takes about `width` bits a position, where a list of k
positions would take 32 k and could not be added.
"""

from __future__ import annotations

import numpy as np

from fedtune.rng import stream

SLOTS = 52  # bits of a number that are used: whole numbers below 2**53 travel exactly


def width_for(members: int) -> int:
    """Bits in which so many votes fit.

    >>> [width_for(members) for members in (1, 2, 3, 4, 100)]
    [1, 2, 2, 3, 7]
    """
    return members.bit_length()


def words_for(count: int, width: int) -> int:
    """How many whole numbers `count` positions take."""
    return -(-count // (SLOTS // width))


def most_of(width: int) -> int:
    """The greatest number that a ballot has: a vote for every position in it."""
    return sum(1 << width * slot for slot in range(SLOTS // width))


def packed(positions: np.ndarray, count: int, width: int) -> np.ndarray:
    """A ballot for some of `count` positions as whole numbers (words,) int64."""
    slots, words = SLOTS // width, words_for(count, width)
    ballot = np.zeros((slots, words), np.uint8)
    ballot.reshape(-1)[positions] = 1
    made = np.zeros(words, np.int64)
    for slot, bits in enumerate(ballot):
        made |= bits.astype(np.int64) << (width * slot)
    return made


def counted(words: np.ndarray, count: int, width: int) -> np.ndarray:
    """Votes for each of `count` positions from a sum of ballots, (count,) of the smallest type."""
    most = (1 << width) - 1
    votes = np.empty((SLOTS // width, words.size), np.min_scalar_type(most))
    for slot, some in enumerate(votes):
        some[:] = (words >> (width * slot)) & most
    return votes.reshape(-1)[:count]


def elected(votes: np.ndarray, least: int, most: int) -> np.ndarray:
    """Positions with at least `least` votes, ascending. Of more than `most`, those with the most votes; among
    equal ones it is drawn, the same way in every run, so that no tensor is favoured by its place."""
    enough = np.flatnonzero(votes >= least)
    if enough.size <= most:
        return enough
    number = votes[enough]
    border = np.partition(number, enough.size - most)[enough.size - most]
    sure, tied = enough[number > border], enough[number == border]
    drawn = stream("tied votes", tied.size).choice(tied, most - sure.size, replace=False)
    return np.sort(np.concatenate([sure, drawn]))
