"""Whether a row was trained on, as an update tells: two known attacks, each a score for a row, and how well
the scores keep members and others apart.

    loss    how much the row's loss fell from the model before to the model after (Yeom et al. 2018,
            arXiv:1709.01604, with the model before as reference)
    update  the cosine between the step that the row alone asks for and what moved (gradient alignment; as Li,
            Li and Ribeiro 2023, arXiv:2212.07650)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedtune.hf.eval_mode import in_eval_mode
from fedtune.model.encode import Encoded
from fedtune.model.forward import forward_only
from fedtune.model.gradient_matching import along
from fedtune.model.private_steps import mean_loss, row_losses
from fedtune.model.tunable import TunableModel

BATCH = 8  # rows in a forward pass, whose logits are all there at once


def losses(tunable: TunableModel, data: Encoded) -> np.ndarray:
    """(rows,) each row's mean loss, as the tunable model stands."""
    found = np.zeros(len(data))
    order = data.by_length()  # so that batches hold little padding
    with forward_only(tunable, data):
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            found[rows] = row_losses(tunable, data.collate(rows)).double().cpu().numpy()
    return found


def cosines(tunable: TunableModel, data: Encoded, moved: Mapping[str, torch.Tensor]) -> np.ndarray:
    """(rows,) between minus each row's gradient, as the tunable model stands, and what moved."""
    trained = [tunable.named[name] for name in moved]
    far = [value.to(one.device, torch.float32) for value, one in zip(moved.values(), trained, strict=True)]
    out = []
    with in_eval_mode(tunable.net):
        for row in range(len(data)):
            found = torch.autograd.grad(mean_loss(tunable, data.collate([row])), trained, allow_unused=True)
            out.append(float(along(found, far)))
    return np.array(out)


def auc(members: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    """The probability that a member scores higher than another row; ties count half."""
    one, two = np.asarray(members)[:, None], np.asarray(others)[None, :]
    return float(((one > two) + 0.5 * (one == two)).mean())


def by_chance(members: int, others: int) -> float:
    """The standard deviation of `auc` where scores say nothing (Mann and Whitney 1947)."""
    return math.sqrt((members + others + 1) / (12 * members * others))
