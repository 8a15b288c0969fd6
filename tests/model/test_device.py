"""What a recipe asks of a GPU's arithmetic reaches torch, before CUDA begins where that matters, and is gone
with the next recipe. No GPU is needed: torch is told, and is not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model import device
from fedtune.model.device import FIXED, WORKSPACE, prepare_torch
from fedtune.model.settings import ModelSettings


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device that is named is there; torch is afterwards as it was."""
    monkeypatch.setattr(device, "pick_device", torch.device)
    monkeypatch.delenv(WORKSPACE, raising=False)
    yield
    monkeypatch.undo()
    prepare_torch(ModelSettings(device="cpu", threads=1))


def told(**settings: Any) -> tuple[str, str]:
    prepare_torch(ModelSettings(threads=1, **settings))
    return torch.get_float32_matmul_precision(), ("default", "warn", "error")[
        torch.get_deterministic_debug_mode()
    ]


def test_a_gpu_is_exact_and_free_in_its_order_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(device="cuda:0") == ("highest", "default")
    assert told(device="cuda:0", tf32=True) == ("high", "default")
    assert told(device="cuda:0", deterministic=True) == ("highest", "error")
    assert device.os.environ[WORKSPACE] == FIXED
    assert told(device="cuda:0") == ("highest", "default")  # the next recipe in the process


def test_a_cpu_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(device="cpu", tf32=True) == ("highest", "error")
    assert WORKSPACE not in device.os.environ


def test_a_workspace_is_not_fixed_when_cuda_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(FedtuneError, match=f"M301: found model.deterministic .*{WORKSPACE}"):
        told(device="cuda:0", deterministic=True)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    assert told(device="cuda:0", deterministic=True) == ("highest", "error")
    assert device.os.environ[WORKSPACE] == ":16:8"  # the user's own
