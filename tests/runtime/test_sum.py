"""The running sum of answers: a + b + c to the bit, in memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add

import numpy as np
import pytest

from fedtune.schema import digest
from fedtune.types import Update, summed


def answer(seed: int, kind: str = "float64") -> Update:
    rng = np.random.default_rng(seed)
    drawn = {"w": rng.normal(size=(7, 5)) * 10.0 ** rng.integers(-8, 8, (7, 5)), "t": rng.normal(size=())}
    tensors = {
        name: np.asarray(value if kind == "float64" else np.int64(value * 2**31), kind)
        for name, value in drawn.items()
    }
    return Update(tensors, 1.0 + seed, {"loss": float(seed)})


@pytest.mark.parametrize("kind", ["float64", "uint32", "int64"])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_it_is_what_adding_gives(kind: str, count: int) -> None:
    updates = [answer(seed, kind) for seed in range(count)]
    before = [digest(update.tensors) for update in updates]
    total, want = summed(iter(updates)), reduce(add, updates)
    assert total is not None
    for name, value in want.tensors.items():
        assert total.tensors[name].tobytes() == value.tobytes() and total.tensors[name].dtype == value.dtype
    assert (total.weight, total.metrics) == (want.weight, want.metrics)
    assert [digest(update.tensors) for update in updates] == before  # what was given is not written to


def test_the_sum_of_many_lies_where_the_sum_of_two_lay() -> None:
    """Two sums in one memory are one: had the third answer made a new array, the fourth would not change the
    third's."""
    seen: list[np.ndarray] = []

    class Watched(Update):
        def joined(self, other: Update, add: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Update:
            made = super().joined(other, add)
            seen.append(made.tensors["w"])
            return Watched(made.tensors, made.weight, made.metrics)

    first = answer(0)
    summed([Watched(first.tensors, first.weight, first.metrics), *(answer(seed) for seed in range(1, 6))])
    assert (
        len(seen) == 5
        and all(np.shares_memory(one, seen[0]) for one in seen)
        and not np.shares_memory(seen[0], first.tensors["w"])
    )


def test_types_and_shapes_that_grow_are_added_as_ever() -> None:
    small = Update({"w": np.ones(3, np.float32)}, 1.0)
    big = Update({"w": np.full(3, 2.0)}, 1.0)
    total = summed([small, small, big])
    assert (
        total is not None
        and total.tensors["w"].dtype == np.float64
        and total.tensors["w"].tolist() == [4.0, 4.0, 4.0]
    )
    assert summed([]) is None
    with pytest.raises(ValueError, match="different names"):
        summed([small, Update({"v": np.ones(3)}, 1.0)])
