"""A client of FedKSeed that trains with gradients: the update, found without a copy of the model, has the
bits of one that was found with it; whether it trains that way follows from the memory that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.methods.seeds import pool_name
from fedtune.model.forward import room_for
from fedtune.model.initial_values import put_update
from fedtune.model.step_memory import StorageWatch
from fedtune.model.tunable import TunableModel, attach
from fedtune.rng import stream
from fedtune.types import Tensors
from fedtune.zeroth import project
from tests import small
from tests.methods.kseed import recipe_of
from tests.tables import adapter_of


class Made(StorageWatch):
    """What is made beside the model."""

    def __init__(self, tunable: TunableModel) -> None:
        super().__init__()
        there = [*tunable.named.values(), *tunable.origin.tensors.values()]
        self.there = {value.untyped_storage()._cdata for value in there}

    def hold(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.there:
            super().hold(tensor)


def stepped(method: Any, tunable: Any) -> Tensors:
    """A state whose accumulators are not zero, in the model."""
    state = method.start(tunable)
    pool = stream("some", 1).integers(-9, 9, method.settings.size).astype(np.int32)
    made = method.state({pool_name(0): pool}, state.kept)
    method.rebuild(tunable, made.shared)
    return made.shared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_what_it_is_beside_a_copy(dtype: str, tiny_bert: Path, data: Path) -> None:
    recipe = recipe_of(tiny_bert, data, {"estimator": "gradient", "lr": 1e-2}, model__dtype=dtype)
    workspace, link = small.workspace_of(recipe)
    method, tunable = link.method, workspace.tunable
    given = stepped(method, tunable)
    before = {name: value.detach().clone() for name, value in tunable.named.items()}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in tunable.named.values():
            value += 0.01 * torch.randn(value.shape, generator=draw)
    wanted = {name: before[name] - value.detach() for name, value in tunable.named.items()}
    with Made(tunable) as watch:
        put_update(tunable, method.replayed(tunable, given))
    assert all(torch.equal(tunable.named[name].detach(), value) for name, value in wanted.items())
    largest = max(4 * value.numel() for value in wanted.values())
    assert watch.peak <= 3 * largest < 4 * tunable.trainable / 3  # of what a copy takes
    pool = method.pool(tunable, 0)
    assert np.array_equal(project(tunable.named, pool), project(wanted, pool))
    method.rebuild(tunable, given)  # the next client begins with the model as it was
    assert all(torch.equal(value.detach(), before[name]) for name, value in tunable.named.items())


def test_room_is_what_others_have_left_of_a_gpu(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = attach(workspace.load("encoder"), adapter_of("full"), 1)
    tunable.base.device = torch.device("cuda", 0)
    for free, reserved, room in ((70, 10, 40), (10, 5, 15), (0, 0, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, held=reserved: held)
        assert room_for(tunable) == room
