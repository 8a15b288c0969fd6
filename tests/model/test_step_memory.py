"""A step that is tried out without memory needs what the same step needs with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from fedtune.model import loss_pieces, step_memory
from fedtune.model.memory_plan import inference_bytes, not_tried, plan, training_bytes, weightless
from fedtune.model.settings import TrainSettings
from fedtune.model.step_memory import StorageWatch, batch_of_shape
from fedtune.model.tunable import attach
from tests.marks import mostly_thorough
from tests.tables import adapter_of

# model, adapter, settings, batch and length
PAIRS = {
    "causal": ("causal", {"kind": "lora", "rank": 4}, {}, 4, 48),
    "causal, recomputed": ("causal", {"kind": "lora", "rank": 4}, {"checkpointing": True}, 4, 48),
    "causal, all weights": ("causal", {"kind": "full"}, {}, 2, 24),
    "causal, prefix": ("causal", {"kind": "prefix", "tokens": 4}, {}, 4, 32),
    "generative classifier": ("decoder", {"kind": "ia3"}, {}, 8, 16),
    "encoder with dropout": ("encoder", {"kind": "lora", "rank": 4}, {}, 8, 24),
    "encoder, head alone": ("encoder", {"kind": "head"}, {}, 16, 32),
    "images": ("images", {"kind": "bias"}, {}, 4, 0),
}


class RealWatch(StorageWatch):
    """Numbers are there to be looked at."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            self.hold(tensor)
        return out


@contextmanager
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(step_memory, "StorageWatch", RealWatch)
        patch.setattr(step_memory, "fused_attention", nullcontext)
        yield


@pytest.mark.parametrize(
    "name", mostly_thorough(PAIRS, ["causal, recomputed", "encoder with dropout", "images"])
)
def test_what_is_tried_out_is_what_a_step_needs(
    name: str, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, table, settings, batch, length = PAIRS[name]
    adapter, train = adapter_of(**table), TrainSettings(batch=batch, **settings)
    planned = plan(workspace.settings(model), adapter, workspace.tasks[model], 2)
    tunable = attach(workspace.base(model), adapter, 1)
    with with_memory(monkeypatch):
        step = step_memory.training_peak(tunable, train, batch, length)
        scored = step_memory.scoring_peak(tunable, batch, length)
    for value in tunable.parameters():
        value.grad = None
    assert planned.peak(train, batch, length) == pytest.approx(step, rel=0.15)
    assert planned.peak(None, batch, length) == pytest.approx(scored, rel=0.15)


def test_logits_count_and_pieces_of_them_too(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times too little was what a formula without logits said."""
    adapter, train = adapter_of(kind="lora", rank=4), TrainSettings(batch=16)
    tunable = attach(workspace.base("causal"), adapter, 1)
    planned = plan(workspace.settings("causal"), adapter, "causal-lm", 0).peak(train, 16, 60)
    logits = 4 * 16 * 60 * tunable.base.net.config.vocab_size
    assert planned and planned > 2 * logits  # logits and their gradient
    monkeypatch.setattr(loss_pieces, "PIECE", 1 << 14)
    monkeypatch.setattr(step_memory, "known", {})
    with with_memory(monkeypatch):
        step = step_memory.training_peak(tunable, train, 16, 60)
    pieces = plan(workspace.settings("causal"), adapter, "causal-lm", 0).peak(train, 16, 60)
    assert pieces == pytest.approx(step, rel=0.15)


@pytest.mark.thorough
def test_a_question_leaves_nothing_to_the_next(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither recomputation nor gradients."""
    adapter = adapter_of(kind="lora", rank=4)
    plain, thrifty = TrainSettings(batch=4), TrainSettings(batch=4, checkpointing=True)

    def fresh() -> Any:
        monkeypatch.setattr(step_memory, "known", {})
        return plan(workspace.settings("causal"), adapter, "causal-lm", 0).peak

    first, other = fresh(), fresh()
    assert first(plain, 2, 48) < first(plain, 4, 48) == other(plain, 4, 48)  # as if nobody had asked before
    thrifty_first = fresh()
    assert thrifty_first(thrifty, 4, 48) == pytest.approx(first(thrifty, 4, 48), rel=0.02)
    assert thrifty_first(plain, 4, 48) == pytest.approx(first(plain, 4, 48), rel=0.02)
    assert first(thrifty, 4, 48) < 0.9 * first(plain, 4, 48)


def test_without_a_trial_sizes_follow_from_the_configuration(workspace: Any) -> None:
    adapter, train = adapter_of(kind="lora", rank=4), TrainSettings(batch=4, checkpointing=True)
    from dataclasses import replace

    planned = replace(plan(workspace.settings("encoder"), adapter, "classify", 3), peak=not_tried)
    layer = 34 * planned.hidden + 5 * planned.heads * 12
    kept = layer + 2 * planned.hidden * planned.layers
    assert training_bytes(planned, train, 12)["activations (estimate)"] == 2 * 4 * 12 * kept
    assert inference_bytes(planned, 4, 12)["activations (estimate)"] == 2 * 4 * 12 * layer


def test_a_network_that_needs_its_numbers_is_not_tried(workspace: Any) -> None:
    tunable = attach(weightless(workspace.settings("encoder"), "classify", 2), adapter_of(kind="head"), 1)

    def numbers(*args: Any, **named: Any) -> Any:
        raise ValueError("a sum of weights")

    tunable.net.forward = numbers
    assert step_memory.watched(tunable)(None, 2, 8) is None


def test_a_batch_is_of_the_shapes_that_data_has(workspace: Any) -> None:
    images = batch_of_shape(attach(workspace.base("images"), adapter_of(kind="bias"), 1), 3, 0)
    assert images["pixel_values"].shape == (3, 3, 8, 8) and images["labels"].shape == (3,)
    texts = batch_of_shape(attach(workspace.base("causal"), adapter_of(kind="lora"), 1), 3, 5)
    assert texts["labels"].shape == texts["input_ids"].shape == (3, 5)
