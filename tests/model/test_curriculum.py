"""A curriculum draws from the first rows, then from more and more of them, and wants an order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.model.curriculum import Curriculum, paced_batches
from fedtune.model.settings import TrainSettings


@pytest.mark.parametrize(
    ("start", "until", "done", "rows"),
    [
        (0.25, 0.5, 0.0, 3),
        (0.25, 0.5, 0.25, 7),
        (0.25, 0.5, 0.5, 10),
        (0.25, 0.5, 0.9, 10),
        (0.5, 1.0, 0.5, 8),
        (0.01, 1.0, 0.0, 1),
        (1.0, 0.5, 0.0, 10),
    ],
)
def test_the_share_grows_in_a_line_to_all(start: float, until: float, done: float, rows: int) -> None:
    assert Curriculum(start=start, until=until).rows(done, 10) == rows


def test_an_order_and_a_curriculum_need_each_other() -> None:
    def said(orders: bool, **settings: Any) -> list[str]:
        recipe = SimpleNamespace(select=[SimpleNamespace(by="pvi", orders=orders)])
        return [found for found, _, _ in Curriculum(**settings).conflicts(recipe)]

    assert said(True) == ["[[select]] by = 'pvi' that orders rows, without [method.train.curriculum]"]
    assert said(False, start=0.2) == ["[method.train.curriculum] with rows in no order"]
    assert said(True, start=0.2) == said(False) == []
    assert list(Curriculum().conflicts(SimpleNamespace(select=[]))) == []


def test_batches_go_through_the_rows_at_the_runs_pace() -> None:
    """20 rows: half of them at first, all of them from the second of two rounds on."""
    s = TrainSettings(batch=4, steps=0, epochs=1, accumulate=2, curriculum=Curriculum(start=0.5, until=0.5))
    first = list(paced_batches(20, s, 7, (0, 2)))
    assert len(first) == 3  # ceil(20 / 4) batches, two a step
    for step, most in zip(first, (10, 14, 17), strict=True):  # 10 + 20 * (number / 3) / 2
        assert len(step) == 2
        for batch in step:
            assert len(set(batch)) == len(batch) == 4 and max(batch) < most
    drawn = [batch for seed in range(30) for step in paced_batches(20, s, seed, (1, 2)) for batch in step]
    assert {row for batch in drawn for row in batch} == set(range(20))
    early = [batch for seed in range(30) for batch in next(iter(paced_batches(20, s, seed, (0, 2))))]
    assert {row for batch in early for row in batch} == set(range(10))
    assert list(paced_batches(20, s, 7, (0, 2))) == first != list(paced_batches(20, s, 8, (0, 2)))
    few = TrainSettings(batch=8, steps=5, curriculum=Curriculum(start=0.1))
    assert [[len(batch) for batch in step] for step in paced_batches(20, few, 7, (0, 100))] == [
        [2],
        *[[3]] * 4,
    ]
