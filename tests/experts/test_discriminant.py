"""A gate from sums against the formula on the rows themselves; what is folded, and that it can be added up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.experts.discriminant import (
    MEAN,
    PRODUCTS,
    SHRINK,
    TEMPER,
    discriminants,
    folds,
    packed,
    unfolded,
)
from fedtune.model.encode import every_second
from fedtune.model.prefix_sums import PLACES, places, prefix_sums
from fedtune.rng import stream
from tests import small

WIDTHS = {"a": 3, "b": 4}


def sums_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    upper = np.triu_indices(rows.shape[1])
    return {MEAN: rows.mean(0), PRODUCTS: (rows.T @ rows / len(rows))[upper]}


def test_the_gate_is_the_discriminant_of_all_rows() -> None:
    draw = stream("discriminant", 1)
    rows = {name: draw.normal(size=(40 + 20 * n, 7)) + n * np.eye(7)[n] for n, name in enumerate("abc")}
    weight, bias = discriminants(
        {name: sums_of(some) for name, some in rows.items()},
        {name: len(some) for name, some in rows.items()},
        "abc",
    )
    left = np.concatenate([some - some.mean(0) for some in rows.values()])
    within = left.T @ left / len(left)
    covariance = (1 - SHRINK) * within + SHRINK * np.diag(np.diag(within))
    x = draw.normal(size=(5, 7))
    far = [x - some.mean(0) for some in rows.values()]
    logs = np.stack([-0.5 * (d @ np.linalg.inv(covariance) * d).sum(1) for d in far], 1) / TEMPER
    said = x @ weight.T + bias
    np.testing.assert_allclose(said - said.mean(1, keepdims=True), logs - logs.mean(1, keepdims=True), 1e-4)


def test_who_has_told_nothing_is_like_all_together() -> None:
    draw = stream("discriminant", 2)
    said = {name: sums_of(draw.normal(size=(9, 7)) + n) for n, name in enumerate("ac")}
    weight, bias = discriminants(said, {"a": 1.0, "c": 3.0}, "abc")
    middle = (said["a"][MEAN] + 3 * said["c"][MEAN]) / 4
    scores = weight @ middle + bias
    assert scores.argmax() == 1 and np.isfinite(scores).all()


@pytest.mark.parametrize("width", [5, 7, 9])
def test_a_gate_at_each_layer_says_what_the_folded_one_does(width: int) -> None:
    draw, of = stream("fold", width), folds(WIDTHS, width, 3)
    rows, bias = draw.normal(size=(2, width)), draw.normal(size=2)
    x = {layer: draw.normal(size=size) for layer, size in WIDTHS.items()}
    folded = np.zeros(width)
    for layer, (buckets, signs) in of.items():
        np.add.at(folded, buckets, signs * x[layer])
    gate = unfolded(rows, bias, of)
    said = sum(gate[f"{layer}.weight"] @ x[layer] + gate[f"{layer}.bias"] for layer in WIDTHS)
    np.testing.assert_allclose(said, rows @ folded + bias, rtol=1e-5)
    if width >= 7:
        assert len(np.unique(np.concatenate([buckets for buckets, _ in of.values()]))) == 7


def test_sums_of_clients_are_those_of_one_that_has_all_rows(tiny_llama: Path, tmp_path: Path) -> None:
    changes = {"data__task": "causal-lm", "data__max_length": 24}
    recipe = small.recipe(tiny_llama, small.write_rows(tmp_path), **changes)
    workspace, _ = small.workspace_of(recipe)
    data, tunable = workspace.train(0), workspace.tunable
    layers = {name: value.shape[1] for name, value in tunable.named.items() if name.endswith("lora_A.weight")}
    of = folds({name.removesuffix(".lora_A.weight"): size for name, size in layers.items()}, 32, 1)
    whole = prefix_sums(tunable, data, 256, of, 32)
    halves = [prefix_sums(tunable, every_second(data, first), 256, of, 32) for first in (0, 1)]
    assert len(whole[1]) == packed(32) and whole[2] == halves[0][2] + halves[1][2] == len(data)
    for number in (0, 1):
        added = sum(one[number] * one[2] for one in halves) / whole[2]
        np.testing.assert_allclose(added, whole[number], atol=1e-5)


def test_places_are_where_the_next_token_carries_the_loss() -> None:
    labels = torch.full((2, 60), -100)
    labels[0, 3:6], labels[1, 10:60] = 7, 7
    first, second = places(labels, "instruct")
    assert first.tolist() == [2, 3, 4] and len(second) == PLACES and second[[0, -1]].tolist() == [9, 58]
    assert [place.tolist() for place in places(torch.tensor([1, 0]), "classify")] == [[-1], [-1]]
