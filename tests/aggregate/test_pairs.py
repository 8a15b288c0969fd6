"""Tensors to pairs and back."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate import Pair, WeightedMean, flat_residual, join, ranks, residual_of, split
from fedtune.errors import FedtuneError
from fedtune.schema import digest
from tests.aggregate.dense import adapter


def test_split_and_join_are_inverse() -> None:
    tensors = adapter(3, 0)
    pairs, rest = split(tensors)
    assert sorted(rest) == ["head.bias", "layers.0.q.lora_magnitude_vector", "temperature"]
    assert ranks(tensors) == {"layers.0.q": 3, "layers.1.up": 3}
    assert digest(join(pairs, rest)) == digest(tensors)


def test_a_residual_travels_as_named_tensors() -> None:
    residual = {"q": Pair(np.ones((3, 2), np.float32), np.zeros((2, 5), np.float32))}
    flat = flat_residual(residual)
    assert {name: value.shape for name, value in flat.items()} == {"q.residual_A": (2, 5), "q.residual_B": (3, 2)}
    assert digest(flat_residual(residual_of(flat | adapter(2, 0)))) == digest(flat)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"q.lora_A.weight": np.ones((2, 5))}, "a pair without its factor B in 'q'"),
        ({"q.lora_B.weight": np.ones((5, 2))}, "a pair without its factor A in 'q'"),
        ({"q.lora_A.weight": np.ones((2, 5)), "q.lora_B.weight": np.ones((4, 3))}, r"factors A \(2, 5\) and B \(4, 3\) in 'q'"),
        ({"q.lora_A.weight": np.ones((0, 5)), "q.lora_B.weight": np.ones((4, 0))}, r"factors A \(0, 5\)"),
        ({"q.lora_A.weight": np.ones((2, 5, 3, 3)), "q.lora_B.weight": np.ones((4, 2, 1, 1))}, r"factors A \(2, 5, 3, 3\)"),
    ],
)
def test_what_is_no_pair_is_refused(tensors: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(FedtuneError, match="M305: found " + said):
        split(tensors)


def test_a_weighted_mean_by_hand() -> None:
    """(1 * 1 + 3 * 5) / 4 = 4; longer than a chunk, so that its seams are crossed."""
    mean = WeightedMean()
    mean.add({"w": np.full(140_000, 1, np.float32)}, 1.0)
    mean.add({"w": np.full(140_000, 5, np.float32)}, 3.0)
    assert (mean.mean()["w"] == 4).all()


def test_equal_values_are_averaged_to_the_bit() -> None:
    value = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    mean = WeightedMean()
    for i in range(100):
        mean.add({"w": value}, 0.1 + i / 7)
    assert digest(mean.mean()) == digest({"w": value})


def test_answers_of_other_names_or_shapes_are_refused() -> None:
    mean = WeightedMean()
    mean.add({"w": np.ones((4, 2), np.float32)}, 1.0)
    with pytest.raises(FedtuneError, match="M305: found shape"):
        mean.add({"w": np.ones((1, 2), np.float32)}, 1.0)
    with pytest.raises(FedtuneError, match="M305: found 'v' in some answers only"):
        mean.add({"v": np.ones(2, np.float32)}, 1.0)
