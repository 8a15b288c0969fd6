"""Examples as batches, padded to their own longest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedtune.model import pixels
from fedtune.model.base import Base
from fedtune.model.objectives.base import IGNORED

Example = dict[str, np.ndarray]


def collation(examples: Sequence[Example], base: Base) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """Numbers of examples -> their batch."""
    if base.task == "image-classify":
        return lambda indices: pixels.collate([examples[i] for i in indices], base.tokenizer)
    pad, side = base.tokenizer.pad_token_id, base.pad_side
    collate = collate_pairs if base.task == "preference" else collate_text
    return lambda indices: collate([examples[i] for i in indices], pad, side)


def collate_text(examples: Sequence[Example], pad: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Padded on one side: input_ids, attention_mask (examples, tokens); labels (examples,) or (examples,
    tokens)."""
    width = max(len(e["input_ids"]) for e in examples)
    ids = np.full((len(examples), width), pad, np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    labels = np.full((len(examples), width), IGNORED, np.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = example["input_ids"], 1
        if example["labels"].ndim:
            labels[row, place] = example["labels"]
    if examples[0]["labels"].ndim == 0:
        labels = np.asarray([e["labels"] for e in examples], np.int64)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def collate_pairs(examples: Sequence[Example], pad: int, side: str = "right") -> dict[str, torch.Tensor]:
    """As `collate_text`, all (examples, 2, tokens): the chosen response first."""
    texts = [
        {name: one[f"{which}{name}"] for name in ("input_ids", "labels")}
        for one in examples
        for which in ("", "rejected_")
    ]
    return {name: value.unflatten(0, (-1, 2)) for name, value in collate_text(texts, pad, side).items()}
