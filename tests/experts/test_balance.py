"""Terms that keep experts in use: where they are least, and which way they push."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedtune.experts.balance import DELTA, localized, owned, switch
from fedtune.experts.gate_table import GateTable
from fedtune.experts.routers import Routing
from fedtune.experts.trained import balanced


def test_the_switch_term_is_one_where_all_are_used_alike_and_k_where_one_has_all() -> None:
    even, real = torch.full((2, 8, 4), 0.25), torch.ones(2, 8, 1)
    assert float(switch(even, torch.ones_like(even), real)) == pytest.approx(1)
    one = torch.zeros(2, 8, 4)
    one[..., 2] = 1
    assert float(switch(one, one, real)) == pytest.approx(4)
    half = torch.cat([torch.ones(2, 4, 1), torch.zeros(2, 4, 1)], 1)
    padded = torch.cat([even[:, :4], one[:, :4]], 1)
    assert float(switch(padded, torch.ones_like(padded), half)) == pytest.approx(1)  # padding does not count


def test_a_step_against_the_switch_term_evens_out() -> None:
    scores = torch.randn(3, 20, 4, generator=torch.manual_seed(1)) + torch.tensor([2.0, 0, 0, 0])
    scores.requires_grad_()
    real, routing = torch.ones(3, 20, 1), Routing(keep="topk", k=2)
    part, kept, _ = routing.parts(scores)
    switch(part, kept, real).backward()
    part = part.detach()
    assert scores.grad is not None
    after = routing.parts(scores.detach() - 50 * scores.grad)[0]
    assert float(after.mean((0, 1)).max()) < float(part.mean((0, 1)).max())


def test_the_localised_term_leaves_a_groups_own_expert_the_greater_share() -> None:
    own, real = torch.tensor([1.0, 0, 0]), torch.ones(2, 5, 1)
    best = torch.tensor([1 + DELTA, 1 - DELTA, 1 - DELTA])
    best = (best / best.sum()).expand(2, 5, 3)
    assert float(localized(best, real, own)) == pytest.approx(0, abs=1e-6)
    for other in ([1 / 3, 1 / 3, 1 / 3], [0.2, 0.4, 0.4], [0.9, 0.05, 0.05]):
        assert float(localized(torch.tensor(other).expand(2, 5, 3), real, own)) > 1e-3


def test_the_owners_term_is_the_cross_entropy_of_its_expert_where_it_lives() -> None:
    part = torch.tensor([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]])
    real = torch.tensor([[[1.0], [1.0], [0.0]]])  # the last is padding
    want = -(math.log(0.8) + math.log(0.5)) / 2
    assert float(owned(part, real, torch.tensor([0.0, 1.0]))) == pytest.approx(want)
    term = balanced(GateTable(rounds=1, owner=2.0), np.array([0, 0, 1], np.float32))
    assert term is not None
    assert float(term(part, part, real, (0, 2))) == pytest.approx(2 * want)
    assert float(term(part, part, real, (0, 1))) == 0
    assert balanced(GateTable(rounds=1, owner=2.0), np.zeros(3, np.float32)) is None
