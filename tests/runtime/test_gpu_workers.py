"""A process for each device answers for clients as this process would: the same run. The devices are two CPUs
here; which GPUs are taken is asked of a torch that says how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.runtime import gpu_workers
from fedtune.runtime.gpu_workers import gpus_for, on_gpus, unlike
from fedtune.runtime.protocol import Link, Transport
from fedtune.runtime.workers import Worker
from fedtune.runtime.workspace import Workspace
from tests import small
from tests.conformance.recipes import METHODS
from tests.waiting import require_ended


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Processes that were begun; at the end none is alive."""
    plain, begun = gpu_workers.spawn, list[int]()

    def spawned(about: Any) -> Worker:
        worker = plain(about)
        begun.append(worker.pid)
        return worker

    monkeypatch.setattr(gpu_workers, "spawn", spawned)
    yield begun
    require_ended(begun)


@pytest.mark.thorough
def test_processes_of_their_own_make_the_same_run(
    tiny_bert: Path, data: Path, tmp_path: Path, pids: list[int]
) -> None:
    recipe = small.recipe(
        tiny_bert, data, **METHODS["fedpeft-chain"]
    )  # clients remember what they did not send
    _, want, _ = small.play(recipe, tmp_path / "alone")

    def carry(link: Link, workspace: Workspace) -> Transport:
        return on_gpus(link, workspace, tmp_path / "logs", ["cpu", "cpu"], None)

    _, got, _ = small.play(recipe, tmp_path / "two", carry=carry)
    assert got["state_sha256"] == want["state_sha256"] and len(pids) == 2


@pytest.mark.thorough
def test_a_process_that_cannot_begin_or_has_another_base_ends_the_run(
    tiny_bert: Path, data: Path, tmp_path: Path, pids: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, link = small.workspace_of(small.recipe(tiny_bert, data))
    with pytest.raises(FedtuneError, match=r"R411: .*cuda:9"):
        on_gpus(link, workspace, tmp_path, ["cuda:9"], None).begin()
    assert "model.device = 'cuda:9'" in capfd.readouterr().err
    with pytest.raises(FedtuneError, match="R406: found base model"):
        on_gpus(replace(link, base="0" * 64), workspace, tmp_path, ["cpu"], None).begin()


def test_a_process_with_another_base_is_told_from_one_that_ended() -> None:
    ended = unlike("", "b" * 64, "cuda:1")
    assert ended.code == "R411" and "work on cuda:1 ended before it could answer" in str(ended)
    other = unlike("a" * 64, "b" * 64, "cuda:1")
    assert other.code == "R406" and f"base model {'a' * 12} in the process that works on cuda:1" in str(other)
    assert "b" * 12 in str(other) and "b" * 13 not in str(other)


def test_which_gpus_are_taken(tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small.recipe(tiny_bert, data)
    workspace, link = small.workspace_of(recipe)

    def taken(recipe: Any = recipe, own_rows: bool = True, asked: int = 0) -> tuple[int, str]:
        devices, why = gpus_for(recipe, workspace, link.method, own_rows, asked)
        assert devices == [f"cuda:{number}" for number in range(len(devices))]
        return len(devices), why

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert taken() == (0, "")  # this model is on the CPU
    workspace.base.device = torch.device("cuda")
    assert taken() == (4, "")  # clients
    assert taken(asked=3) == (3, "") and taken(asked=1) == (0, "")
    assert taken(own_rows=False) == (0, "the rows are in this process alone")
    one = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cuda:1"})})
    assert taken(one) == (0, "model.device = 'cuda:1' names one of 8 GPUs")
    together = recipe.model_copy(update={"method": recipe.method.at_once(1).model_copy(
        update={"train": recipe.method.train.model_copy(update={"together": 2})})})  # fmt: skip
    assert taken(together)[1].startswith("clients go through the model together")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert taken() == (0, "")


def test_an_actor_of_ray_finds_its_gpu_under_number_0(
    tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.flower.client_app import on_own_gpu

    def device(asked: str) -> str:
        return on_own_gpu(small.recipe(tiny_bert, data, model__device=asked)).model.device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device("cuda:1") == "cuda:1"  # which this machine does not have
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert [device(asked) for asked in ("cuda:1", "cpu", "auto")] == ["cuda", "cpu", "auto"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device("cuda:1") == "cuda:1"  # a process that sees several
