"""How hard a sample is, by EL2N (Paul et al. 2021, arXiv 2107.07075): through the whole model, or through the
shortcut from head to tail as SFPrompt does.

The shortcut's scores are a guess. On a small ViT they had a rank correlation of 0 with the true ones at k =
0, where a class token has seen no
pixel yet, 0.4 to 0.6 at k = 1 after local training and 0.8 at k = 2; and keeping the hardest half was worse
than keeping any half. Hence the
refusal here, and the figure `el2n_rank`, which tells what the guess is worth in the run at hand.
"""

from __future__ import annotations

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.rng import stream
from fedtune.split.cut import Cut
from fedtune.split.row_selection import Kind


def el2n(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Norm of softmax(logits) - onehot(label), (B,), between 0 and sqrt 2; of a language model the mean over
    the tokens that carry loss.

    logits (B, C) with labels (B,), or (B, T, V) with labels (B, T), of which -100 carries none.
    """
    if logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    missed = logits.float().softmax(-1) - torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])
    norms = missed.norm(dim=-1) * kept
    return norms if logits.ndim == 2 else norms.sum(1) / kept.sum(1).clamp(min=1)


def check_sees(kind: Kind, cut: Cut, blocks: int) -> None:
    """Raise S703 where no attention lies between the inputs and the one row that a classifier reads: its
    shortcut says the same of every sample.

    `kind` is what `slim.pooling` says of the model.
    """
    if cut.k == 0 and cut.m == blocks and kind in ("first", "last"):
        raise FedtuneError(
            "S703",
            f"local_update or pruning = 'el2n' with k = {cut.k}, m = {cut.m} of {blocks} blocks, where the "
            f"task head reads the {kind} token alone",
            "a block in head or tail, without which that token has seen nothing of the input",
            "set k to 1 or more (2 is better), or switch these phases off",
        )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, ties at their mean rank; 0 where one side is constant."""
    x, y = ranks(a), ranks(b)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def hardest(scores: np.ndarray, keep: float) -> list[int]:
    """Indices, ascending, of the share `keep` with the largest scores; of equals the earlier."""
    return sorted(np.argsort(-scores, kind="stable")[: kept(len(scores), keep)].tolist())


def random(count: int, keep: float, *numbers: int) -> list[int]:
    """Indices, ascending, of a random share; `numbers` are those of the draw: run seed, round, client."""
    return sorted(stream("split pruning", *numbers).permutation(count)[: kept(count, keep)].tolist())


def kept(count: int, keep: float) -> int:
    return min(count, max(1, round(count * keep)))
