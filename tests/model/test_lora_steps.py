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
from fedtune.model.lora_steps import train_slices
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


def by_rank(name: str, value: np.ndarray) -> np.ndarray:
    """With the rank's axis first, where it has one."""
    return value.T if name.endswith(B_END) else value


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_changes_one_slice_as_it_would_alone(workspace: Any, optimizer: str) -> None:
    made = []
    for slices in (1, 2):
        tunable = attach(workspace.base("encoder"), adapter_of(rank=4, slices=slices), 1)
        with torch.no_grad():
            for name in [name for name in tunable.named if name.endswith(B_END)]:
                tunable.named[name].add_(0.1)  # else A has no gradient
        start = tunable.read()
        train = TrainSettings(optimizer=optimizer, lr=1e-2, head_lr=0.0, steps=1, batch=6)
        fit(tunable, workspace.encoded("encoder"), train, 2)
        made.append({name: value - start[name] for name, value in tunable.read().items()})
    plain, sliced = ({name: by_rank(name, one) for name, one in change.items()} for change in made)
    pairs = [name for name in plain if name.endswith((A_END, B_END))]
    first = sum(np.abs(sliced[name][:2]).sum() for name in pairs) > 0
    part, rest = (slice(0, 2), slice(2, 4)) if first else (slice(2, 4), slice(0, 2))
    for name in pairs:  # the same slice of each
        np.testing.assert_array_equal(sliced[name][part], plain[name][part])
        assert not sliced[name][rest].any()
    assert sum(bool(plain[name][rest].any()) for name in pairs) > len(pairs) / 2
    for name in plain.keys() - set(pairs):
        np.testing.assert_array_equal(sliced[name], plain[name])


def test_slices_take_turns_and_what_rests_gathers_no_momentum(workspace: Any) -> None:
    """Under AdamW a slice that was not drawn would drift along its old moments."""
    train = TrainSettings(lr=1e-2, head_lr=0.0, steps=1, batch=6)
    seen = set()
    for seed in range(8):
        tunable = attach(workspace.base("encoder"), adapter_of(rank=2, slices=2), 1)
        start = tunable.read()
        fit(tunable, workspace.encoded("encoder"), train, seed)
        name = next(name for name in start if name.endswith(B_END))
        seen.add(tuple((tunable.read()[name] != start[name]).any(axis=0).tolist()))
    assert seen == {(True, False), (False, True)}
    tunable = attach(workspace.base("encoder"), adapter_of(rank=2, slices=2), 1)
    optimizer = make_optimizer(tunable, train, {})
    train_slices(optimizer, tunable, 3)
    value = tunable.named[name]
    drawn = np.zeros(2)
    for _ in range(6):
        before = value.detach().clone()
        for one in tunable.parameters():
            one.grad = torch.ones_like(one)
        optimizer.step()
        still = [bool(torch.equal(value[:, i], before[:, i])) for i in range(2)]
        assert sorted(still) == [False, True]
        drawn[still.index(False)] += 1
        moment = optimizer.state[value]["exp_avg"].numpy()
        np.testing.assert_allclose(moment, np.broadcast_to(1 - 0.9**drawn, moment.shape), rtol=1e-6)
    assert drawn.all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__adapter__slices": 3}, "of rank 2"),
        ({"method__lora_start": "pissa"}, "with method.lora_start"),
        ({"aggregate": {"rule": "fedex", "extra": 4}}, "with aggregate.rule = 'fedex'"),
        (
            {"method__lora_rank_by_client": [1, 2], "aggregate": {"rule": "flexlora"}},
            "with method.lora_rank_by_client",
        ),
    ],
)
def test_slices_that_cannot_be_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=rf"C104: found method.adapter.slices = \d {words}"):
        parse(small.tree(Path("none"), tmp_path, **({"method__adapter__slices": 2} | changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregate": {"rule": "mean"}}, "aggregate.rule = 'mean'"),
        ({"aggregate": {"rule": "fedsa"}}, "aggregate.rule = 'fedsa'"),
        ({"aggregate": {"rule": "hft"}}, "aggregate.rule = 'hft'"),
        ({"aggregate": {"rule": "ffa"}, "method__adapter__dora": True}, "dora"),
        ({"aggregate": {"rule": "rolora"}, "method__lora_start": "pissa"}, "lora_start"),
        (
            {"aggregate": {"rule": "ffa"}, "method__type": "experts", "method__experts": {"by": "clients"}},
            "method.experts",
        ),
    ],
)
def test_a_rule_under_which_a_moves_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=rf"C104: found method.adapter.projected with .*{words}"):
        parse(small.tree(Path("none"), tmp_path, **changes, method__adapter__projected=True))
