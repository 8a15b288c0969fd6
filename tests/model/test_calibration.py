"""Expected calibration error: against the paper's equation, and answers as the model gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model.calibration import BINS, answers, calibration, expected_error
from fedtune.model.loss import IGNORED
from fedtune.model.tunable import attach
from tests.tables import adapter_of


def test_bins_are_open_below_and_weighted_by_their_counts() -> None:
    draw = np.random.default_rng(3)
    confidence, right = draw.random(500), draw.random(500) < 0.6
    want = 0.0
    for number in range(BINS):
        here = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if here.any():
            want += here.sum() / 500 * abs(right[here].mean() - confidence[here].mean())
    found = expected_error(confidence, right)
    assert found["ece"] == pytest.approx(want) and found["count"] == 500
    assert sum(one["count"] for one in found["bins"]) == 500
    edge = expected_error(np.array([0.0, 1 / BINS, 1.0]), np.array([0, 1, 1]))
    assert edge["bins"] == [
        {"to": 0.0667, "count": 2, "confidence": pytest.approx(1 / 30), "accuracy": 0.5},
        {"to": 1.0, "count": 1, "confidence": 1.0, "accuracy": 1.0},
    ]
    assert edge["ece"] == pytest.approx(2 / 3 * (0.5 - 1 / 30))


@pytest.mark.parametrize(("model", "of"), [("encoder", "rows"), ("causal", "tokens")])
def test_answers_are_the_models_likeliest(model: str, of: str, workspace: Any) -> None:
    tunable, encoded = attach(workspace.base(model), adapter_of(kind="lora"), 0), workspace.encoded(model)
    tunable.net.eval()
    want: list[tuple[float, bool]] = []
    with torch.no_grad():
        for number in encoded.by_length():
            batch = encoded.collate([number])
            labels = batch.pop("labels")
            logits = tunable.net(**batch).logits
            if of == "tokens":
                logits, labels = logits[:, :-1], labels[:, 1:]
            shares = logits.flatten(0, -2).softmax(-1)
            for share, label in zip(shares, labels.flatten(), strict=True):
                if label != IGNORED:
                    want.append((float(share.max()), bool(share.argmax() == label)))
    sure, right = answers(tunable, encoded, 4)
    assert sure.dtype == np.float64
    np.testing.assert_allclose(sure, [share for share, _ in want], rtol=1e-5)
    assert right.tolist() == [known for _, known in want]
    found = calibration(tunable, encoded, 4)
    assert found == expected_error(sure, right) | {"of": of} and found["count"] == len(want)
