"""Scores of membership: on real gradients, against sklearn's area and every order that chance can bring."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model.loss import carries, summed_loss
from fedtune.model.membership import auc, by_chance, cosines, losses
from fedtune.model.tunable import attach
from tests.model.cases import VARIANTS
from tests.tables import adapter_of


def test_the_area_is_sklearn_s_and_its_spread_that_of_all_orders() -> None:
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    members, others = draw.integers(0, 5, 20), draw.integers(0, 4, 30)
    labels = np.repeat([1, 0], [20, 30])
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, np.concatenate([members, others])))
    orders = [auc(one, sorted({*range(7)} - {*one})) for one in itertools.combinations(range(7), 3)]
    assert np.mean(orders) == pytest.approx(0.5) and np.std(orders) == pytest.approx(by_chance(3, 4))


@pytest.mark.parametrize("model", ["encoder", "causal"])
def test_a_step_along_a_row_s_gradient_is_that_row_s(workspace: Any, model: str) -> None:
    tunable, encoded = (
        attach(workspace.base(model), adapter_of(**VARIANTS["full"]), 1),
        workspace.encoded(model),
    )
    tunable.net.eval()
    batch = encoded.collate([1])
    loss = summed_loss(tunable, batch)[0] / carries(tunable.base.task, batch)
    found = torch.autograd.grad(loss, list(tunable.named.values()), allow_unused=True)
    moved = {
        name: torch.zeros_like(value) if one is None else -0.01 * one
        for (name, value), one in zip(tunable.named.items(), found, strict=True)
    }
    scores = cosines(tunable, encoded, moved)
    assert scores[1] == pytest.approx(1.0, abs=1e-4) and scores[1] == scores.max()
    assert losses(tunable, encoded)[1] == pytest.approx(float(loss), rel=1e-4)
