"""A base in half precision: what its adapter computes, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fedtune.model import fit as fitting
from fedtune.model.fit import fit
from fedtune.model.settings import TrainSettings
from fedtune.model.step_memory import StorageWatch
from fedtune.model.tunable import attach
from tests.tables import adapter_of


class Counted(StorageWatch):
    """Operations, too."""

    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            self.hold(tensor)
        return out


@contextmanager
def as_peft_has_it(*args: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_are_not_cast_there_and_back(
    checkpointing: bool, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, with fewer operations and less memory."""
    base, encoded = workspace.load("causal", dtype="bfloat16"), workspace.encoded("causal")
    tunable = attach(base, adapter_of(kind="lora", rank=2, targets=("all-linear",)), 1)
    settings = TrainSettings(steps=3, lr=0.05, batch=3, checkpointing=checkpointing)
    before, ends = tunable.read(), []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(fitting, "uncast", as_peft_has_it)
        with Counted() as watch:
            report = fit(tunable, encoded, settings, 4)
        ends.append((report.loss, tunable.read(), watch.operations, watch.peak))
        tunable.write(before)
    (loss, values, operations, peak), (other, wanted, more, higher) = ends
    assert loss == other and all((values[name] == wanted[name]).all() for name in wanted)
    assert any((values[name] != before[name]).any() for name in before)
    assert operations < more and peak <= higher
    assert checkpointing or peak < higher
    assert all(getattr(module, "cast_input_dtype_enabled", True) for module in base.net.modules())


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}])
def test_an_adapter_is_drawn_alike_on_bases_of_any_type(options: dict[str, Any], workspace: Any) -> None:
    drawn = []
    for dtype in ("float32", "bfloat16"):
        tunable = attach(workspace.load("causal", dtype=dtype), adapter_of(rank=2, **options), 1)
        drawn.append({name: v for name, v in tunable.read().items() if "magnitude" not in name})
    assert drawn[0].keys() == drawn[1].keys() and any(value.any() for value in drawn[0].values())
    assert all((drawn[0][name] == drawn[1][name]).all() for name in drawn[0])
