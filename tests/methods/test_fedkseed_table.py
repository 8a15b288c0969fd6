"""Walks by a table: weights are always the first values plus a table, in the first values' type, and end as what
everybody rebuilds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.methods import integers
from fedtune.methods.fedkseed import FedKSeed
from fedtune.model.base import Base
from fedtune.model.encode import Encoded
from fedtune.model.memory_plan import not_tried
from fedtune.model.tunable import TunableModel
from tests.methods.kseed import recipe_of
from tests.model.test_step_memory import RealWatch

TABLE = {"walk": "table"}
K, STEPS = 256, 12


def method_of(**changes: Any) -> FedKSeed:
    from fedtune.methods.fedkseed import FedKSeedTable

    table = {"size": K, "estimator": "spsa", "steps": STEPS, "batch": 4, "lr": 1e-3, **TABLE, **changes}
    return FedKSeedTable(**table).build(3, None)


def walk_of(method: FedKSeed, tunable: TunableModel, data: Encoded, held: np.ndarray) -> np.ndarray:
    """The scalars of a walk from accumulators."""
    method.rebuild(tunable, {"pool-0000": held})
    seeds = integers.draw(K, STEPS, (1, 1, 0))
    scalars = method.walk(tunable, data, 0, seeds, 5, held=held).scalars
    np.add.at(held, seeds, scalars << integers.FRACTION)
    return scalars


@pytest.fixture
def half(workspace: Any) -> Base:
    base: Base = workspace.load("encoder", dtype="bfloat16")
    return base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [{}, {"estimator": "fzoo", "group": 3}])
def test_a_walk_ends_as_what_everybody_rebuilds(dtype: str, more: dict[str, Any], workspace: Any) -> None:
    method = method_of(**more)
    tunable = method.prepare(workspace.load("encoder", dtype=dtype), 1)
    held = np.random.default_rng(0).integers(-9000, 9000, K)
    scalars = walk_of(method, tunable, workspace.encoded("encoder"), held)
    walked = tunable.read()
    method.rebuild(tunable, {"pool-0000": held})
    assert scalars.any() and all((walked[name] == value).all() for name, value in tunable.read().items())


def test_scalars_are_those_of_a_walk_by_moves(workspace: Any) -> None:
    """But for roundings of weights, which losses hardly show."""
    found = []
    for walk in ("table", "moves"):
        method = method_of(walk=walk, eps=1e-2)
        tunable = method.prepare(workspace.load("encoder"), 1)
        found.append(walk_of(method, tunable, workspace.encoded("encoder"), np.zeros(K, np.int64)))
    assert np.abs(found[0] - found[1]).max() <= 0.01 * np.abs(found[1]).max()


def test_a_base_of_two_bytes_is_walked_in_four(half: Base, workspace: Any) -> None:
    """Two of the base and two that are walked with; of a fresh head four. Nothing of the model's size comes on
    top, neither at the start nor on the way."""
    held, start, way = {}, {}, {}
    for walk in ("moves", "table"):
        method = method_of(walk=walk)
        with RealWatch() as watch:
            tunable = method.prepare(half, 1)
        held[walk] = sum(value.numel() * value.element_size() for value in tunable.named.values())
        start[walk] = watch.peak
        with RealWatch() as watch:
            walk_of(method, tunable, workspace.encoded("encoder"), np.zeros(K, np.int64))
        way[walk] = watch.peak
    fresh = sum(half.weights[name].numel() for name in half.fresh)
    assert 0 < fresh < 0.1 * half.size
    assert held == {"moves": 4 * half.size, "table": 2 * half.size + 2 * fresh}
    assert start["table"] <= start["moves"] - 1.9 * half.size
    assert way["table"] <= way["moves"] - 2 * half.size  # float32 weights are cast, and the casts kept


def test_check_says_how_much_less(half: Base, workspace: Any) -> None:
    said, held = {}, {}
    for walk in ("moves", "table"):
        method = method_of(walk=walk)
        costs = method.capabilities.costs
        planned = costs.plan(workspace.settings("encoder", dtype="bfloat16"), "classify", 2)
        said[walk] = costs.memory(replace(planned, peak=not_tried), 16)["spsa: trained tensors"]
        tunable = method.prepare(half, 1)
        held[walk] = sum(value.numel() * value.element_size() for value in tunable.named.values())
    assert said["moves"] == held["moves"]
    assert said["table"] == pytest.approx(held["table"], rel=0.05)  # no file says that the head is fresh


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": "independent"}, "method.pool = 'independent'"),
        ({"refresh": 1}, "method.refresh = 1"),
        ({"refresh": 1, "curvature": True}, "method.refresh = 1"),
        ({"estimator": "gradient"}, "clients that all use gradients"),
        ({"estimator": "auto", "estimators": ["gradient"]}, "clients that all use gradients"),
    ],
)
def test_what_has_no_table_is_refused(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=f"method.walk = 'table' with {words}") as caught:
        recipe_of(tiny_bert, data, TABLE | changes)
    assert caught.value.code == "C104"


def test_where_some_clients_use_gradients_weights_stay_float32(half: Base) -> None:
    for changes in ({"estimators": ("spsa", "gradient"), "estimator": "auto"}, {"space": "adapter"}):
        tunable = method_of(**changes).prepare(half, 1)
        assert {value.dtype for value in tunable.named.values()} == {torch.float32}
