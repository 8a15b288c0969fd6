"""What several objectives begin with."""

from __future__ import annotations

import torch

from fedtune.model.objectives.base import IGNORED


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the labels that carry loss, (N,), and where they stand among all labels: a mask of the labels'
    shape."""
    there = labels != IGNORED
    rows, wanted = logits[there], labels[there]
    return rows.log_softmax(-1).gather(-1, wanted[:, None])[:, 0], there
