"""Who is asked: a pure function of the seed and the round."""

from __future__ import annotations

from collections import Counter

import pytest

from fedtune.config import SamplingSettings
from fedtune.errors import FedtuneError
from fedtune.runtime.sampling import sample, wanted


@pytest.mark.parametrize(
    ("settings", "clients", "want"),
    [
        ({}, 7, 7),
        ({"fraction": 0.5}, 8, 4),
        ({"fraction": 0.01}, 8, 1),
        ({"count": 3}, 8, 3),
        ({"count": 8}, 8, 8),
    ],
)
def test_as_many_as_the_recipe_says(settings: dict[str, float], clients: int, want: int) -> None:
    chosen = SamplingSettings.model_validate(settings)
    members = sample(chosen, clients, 1, 1)
    assert wanted(chosen, clients) == len(members) == len(set(members)) == want
    assert list(members) == sorted(members) and set(members) <= set(range(clients))


def test_a_share_more_is_rounded_up_and_never_more_than_there_are() -> None:
    three = SamplingSettings(count=3)
    assert [len(sample(three, 8, 1, 1, over)) for over in (0.0, 0.1, 1 / 3, 0.5, 1.0)] == [3, 4, 4, 5, 6]
    assert sample(three, 4, 1, 1, 1.0) == (0, 1, 2, 3)


def test_every_round_draws_anew_and_the_same_again() -> None:
    two = SamplingSettings(count=2)
    drawn = [sample(two, 6, 5, number) for number in range(1, 301)]
    assert drawn == [sample(two, 6, 5, number) for number in range(1, 301)]
    assert drawn != [sample(two, 6, 6, number) for number in range(1, 301)]
    times = Counter(client for members in drawn for client in members)
    assert set(times) == set(range(6)) and all(60 < count < 140 for count in times.values())  # 100 expected


def test_more_than_there_are_is_a_sentence() -> None:
    with pytest.raises(FedtuneError, match=r"C104: found sampling.count = 5 of 4 clients"):
        sample(SamplingSettings(count=5), 4, 1, 1)
