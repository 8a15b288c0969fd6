"""LoRA+ and LoRA-FA: rates as peft's own optimiser has them, and a projected gradient that is least squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft.optimizers
import pytest
import torch

from fedtune.config import parse
from fedtune.errors import FedtuneError
from fedtune.model.fit import fit, make_optimizer
from fedtune.model.lora_ranks import A_END, B_END, freeze
from fedtune.model.loss import summed_loss
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import attach, detach
from tests import small
from tests.tables import adapter_of

SGD = TrainSettings(optimizer="sgd", lr=1.0, head_lr=0.0, steps=1, batch=6)


def test_b_learns_faster_by_the_ratio_as_in_peft(workspace: Any) -> None:
    tunable = attach(workspace.base("causal"), adapter_of(rank=2, lr_ratio=16.0), 1)
    ours = make_optimizer(tunable, TrainSettings(lr=1e-3, head_lr=0.0), {})
    theirs = peft.optimizers.create_loraplus_optimizer(
        tunable.net, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    rates = [{id(v): g["lr"] for g in one.param_groups for v in g["params"]} for one in (ours, theirs)]
    assert rates[0] == rates[1] and set(rates[0].values()) == {1e-3, 1.6e-2}


def test_a_ratio_of_one_is_the_plain_run_to_the_bit(workspace: Any) -> None:
    made = []
    for options in ({}, {"lr_ratio": 1.0}, {"lr_ratio": 4.0}):
        tunable = attach(workspace.base("encoder"), adapter_of(rank=2, **options), 1)
        fit(tunable, workspace.encoded("encoder"), TrainSettings(lr=1e-2, steps=3), 2)
        made.append(tunable.read())
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
    assert not all(np.array_equal(made[0][name], made[2][name]) for name in made[0])


def test_a_projected_step_is_the_nearest_to_a_step_of_the_weight_itself(workspace: Any) -> None:
    """The gradient of each adapted weight by plain torch, and numpy's least squares of it on the rows of A."""
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    whole = attach(base, adapter_of(kind="full"), 1)
    batch = encoded.collate(range(6))
    (summed_loss(whole, batch)[0] / 6).backward()
    gradients = {name: value.grad.double().numpy() for name, value in whole.named.items()}
    detach(whole)
    tunable = attach(base, adapter_of(rank=3, alpha=6.0, projected=True), 1)
    freeze(tunable, [name for name in tunable.named if name.endswith(A_END)])
    before = tunable.read()
    fit(tunable, encoded, SGD, 2)
    pairs = [name for name in before if name.endswith(B_END)]
    assert len(pairs) > 10
    for name in pairs:
        module = name.removesuffix(B_END)
        a = 2.0 * tunable.still[module + A_END].detach().double().numpy()  # with its scale
        full = gradients[module.removeprefix("base_model.model.") + ".weight"]
        best = np.linalg.lstsq(a.T, full.T, rcond=None)[0].T
        np.testing.assert_allclose(before[name] - tunable.read()[name], best, rtol=1e-3, atol=1e-6)


def test_while_a_is_trained_too_nothing_is_projected(workspace: Any) -> None:
    made = []
    for projected in (False, True):
        tunable = attach(workspace.base("encoder"), adapter_of(rank=2, projected=projected), 1)
        fit(tunable, workspace.encoded("encoder"), SGD, 2)
        made.append(tunable.read())
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregate": {"rule": "mean"}}, "aggregate.rule = 'mean'"),
        ({"aggregate": {"rule": "fedsa"}}, "aggregate.rule = 'fedsa'"),
        ({"aggregate": {"rule": "hft"}}, "aggregate.rule = 'hft'"),
        ({"aggregate": {"rule": "ffa"}, "method__adapter__dora": True}, "dora"),
    ],
)
def test_a_rule_under_which_a_moves_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=rf"C104: found method.adapter.projected with .*{words}"):
        parse(small.tree(Path("none"), tmp_path, **changes, method__adapter__projected=True))
