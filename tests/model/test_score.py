"""Accuracy and perplexity against arithmetic, whatever the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model.encode import encode
from fedtune.model.forward import mean_loss
from fedtune.model.frozen_front import FrozenFront
from fedtune.model.score import score
from fedtune.model.tunable import attach
from tests import tiny
from tests.tables import adapter_of
from tests.tunables import bare


@pytest.mark.parametrize("kind", ["none", "prompt", "prefix"])
def test_perplexity_by_hand(workspace: Any, kind: str) -> None:
    """One row at a time, one token at a time: exp of the mean of -log p."""
    base, encoded = workspace.base("causal"), workspace.encoded("causal")
    tunable = bare(base) if kind == "none" else attach(base, adapter_of(kind=kind, tokens=3), 1)
    surprise = []
    with torch.no_grad():
        for example in encoded.examples:
            ids = torch.tensor(example["input_ids"], dtype=torch.long)[None]
            logits = tunable.net(input_ids=ids).logits[0, -ids.shape[1] :]  # virtual tokens stand in front
            surprise += [-float(logits[t].log_softmax(-1)[ids[0, t + 1]]) for t in range(ids.shape[1] - 1)]
    mean = sum(surprise) / len(surprise)
    for batch in (1, 2, 32):
        got = score(tunable, encoded, batch)
        assert (got.name, got.count) == ("perplexity", len(surprise)) == ("perplexity", encoded.tokens)
        assert math.isclose(got.loss, mean, rel_tol=1e-5)
        assert math.isclose(got.metric, math.exp(mean), rel_tol=1e-5)


@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_accuracy_by_hand_with_padding(workspace: Any, model: str) -> None:
    base = workspace.base(model)
    rows = [
        {"text": " ".join(tiny.SENTENCES[i % 6].split()[: 2 + i % 4]), "label": "ab"[i % 2]}
        for i in range(10)
    ]
    encoded = encode(rows, base, max_length=32)
    tunable = bare(base)
    right, loss = 0, 0.0
    with torch.no_grad():
        for i in range(10):
            logits = tunable.net(input_ids=encoded.collate([i])["input_ids"]).logits[0]
            right += int(logits.argmax()) == i % 2
            loss -= float(logits.log_softmax(-1)[i % 2])
    for batch in (1, 3, 10):
        got = score(tunable, encoded, batch)
        assert (got.name, got.count, got.metric) == ("accuracy", 10, right / 10)
        assert math.isclose(got.loss, loss / 10, rel_tol=1e-5)


def test_nothing_to_score(workspace: Any) -> None:
    with pytest.raises(FedtuneError, match="D202"):
        score(bare(workspace.base("encoder")), encode([], workspace.base("encoder"), max_length=8))


@pytest.mark.parametrize(
    ("kind", "more", "skips"),
    [
        ("lora", {"last": 1}, True),
        ("head", {}, True),
        ("lora", {}, False),
        ("full", {}, False),
        ("prompt", {}, False),
        ("adapter", {"shared": True, "reduction": 4}, False),
    ],
)
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_what_frozen_blocks_say_is_computed_once_and_changes_no_score(
    workspace: Any, model: str, kind: str, more: dict[str, Any], skips: bool
) -> None:
    base, front = workspace.base(model), FrozenFront()
    rows = [{"text": sentence, "label": "ab"[i % 2]} for i, sentence in enumerate(tiny.SENTENCES[:6] * 2)]
    encoded, tunable = encode(rows, base, max_length=32), attach(base, adapter_of(kind=kind, **more), 1)
    for step in range(3):
        assert score(tunable, encoded, 4, front) == score(tunable, encoded, 4)
        tunable.write({name: value + np.float32(0.1 * step) for name, value in tunable.read().items()})
    assert bool(front.kept) == skips
    frozen = next(iter(base.weights.values()))
    before = frozen.detach().clone()
    with torch.no_grad():  # somebody writes into the base
        frozen.mul_(1.5)
    try:
        assert score(tunable, encoded, 4, front) == score(tunable, encoded, 4)
    finally:
        with torch.no_grad():
            frozen.copy_(before)  # to the bit: the base is shared by all tests


@pytest.mark.parametrize("room", [5, 1, 0])
def test_scores_come_in_smaller_batches_where_memory_is_small(
    workspace: Any, room: int, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    """A device that holds `room` examples: 8 are tried as 4, 2, 1; the score is the same, and the next one
    begins with what fits. So does a loss without gradients."""
    base = workspace.base("encoder")
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate((tiny.SENTENCES * 3)[:16])]
    encoded, tunable = encode(rows, base, max_length=12), attach(base, adapter_of(kind="head"), 1)
    batch = encoded.collate(range(16))
    want, loss = score(tunable, encoded, 8), mean_loss(tunable, batch)
    real, seen = base.net.forward, list[int]()

    def forward(*given: Any, **named: Any) -> Any:
        seen.append(len(named["input_ids"]))
        if seen[-1] > room:
            raise torch.OutOfMemoryError("pretended")
        return real(*given, **named)

    monkeypatch.setattr(base.net, "forward", forward)
    if room == 0:
        with pytest.raises(FedtuneError, match="M309: a single example"):
            score(tunable, encoded, 8)
        return
    got = score(tunable, encoded, 8, FrozenFront())
    assert (got.metric, got.said, got.wanted) == (want.metric, want.said, want.wanted)
    assert math.isclose(got.loss, want.loss, rel_tol=1e-5)
    assert seen[0] == 8 and seen[-1] == min(room, 4)
    seen.clear()
    assert math.isclose(mean_loss(tunable, batch), loss, rel_tol=1e-5) and max(seen) <= room


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    def forward(**named: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    base = workspace.base("encoder")
    tunable = attach(base, adapter_of(kind="head"), 1)
    monkeypatch.setattr(base.net, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        score(tunable, workspace.encoded("encoder"), 4)
    assert not base.fits
