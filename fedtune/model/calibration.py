"""How far a model's confidence is from how often it is right.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedtune.model.device_memory import losses_in_parts
from fedtune.model.encode import Encoded
from fedtune.model.loss import autocast, inputs_of, logits_of
from fedtune.model.objectives.base import IGNORED
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

BINS = 15  # as in the paper


def calibration(tunable: TunableModel, encoded: Encoded, batch: int) -> dict[str, Any]:
    """Expected calibration error of the model on rows, and what it is made of; of a language model, over the
    tokens that it predicts."""
    confidence, right = answers(tunable, encoded, batch)
    return expected_error(confidence, right) | {"of": "tokens" if tunable.base.task in LM_TASKS else "rows"}


def expected_error(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Confidences (n,) in 0..1 and whether each answer was right (n,) -> ece, count, and for each bin that
    has answers its upper end, count, mean confidence and accuracy.

    Equation 3: bins of equal width, open below; their distances weighted by their counts.

    >>> found = expected_error(np.array([0.95, 0.95, 0.55, 0.55]), np.array([1, 0, 1, 1]))
    >>> round(found["ece"], 3), [(one["to"], one["count"]) for one in found["bins"]]
    (0.45, [(0.6, 2), (1.0, 2)])
    """
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in np.unique(place):
        here = place == number
        sure, accuracy = float(confidence[here].mean()), float(right[here].mean())
        bins.append(
            {
                "to": round((int(number) + 1) / BINS, 4),
                "count": int(here.sum()),
                "confidence": sure,
                "accuracy": accuracy,
            }
        )
    ece = sum(one["count"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / len(confidence)
    return {"ece": ece, "count": len(confidence), "bins": bins}


def answers(tunable: TunableModel, encoded: Encoded, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each answer that the model would give, and whether it is right: (n,), (n,)."""
    order = encoded.by_length()
    most = 1 if tunable.base.task in LM_TASKS else batch  # a vocabulary for each token is large

    def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        with autocast(tunable, "off"):
            said = logits_of(tunable, *inputs_of(tunable, encoded.collate(order[start:stop])))
        logits, labels = said[0].flatten(0, -2), said[1].flatten()
        known = labels != IGNORED
        best = logits[known].float().softmax(-1).max(-1)
        return best.values.cpu().numpy().astype(np.float64), (best.indices == labels[known]).cpu().numpy()

    tunable.net.eval()
    with torch.no_grad():
        sure, right = zip(*losses_in_parts(tunable.base, len(order), most, part), strict=True)
    return np.concatenate(sure), np.concatenate(right)
