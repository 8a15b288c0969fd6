"""Batches of texts with little padding: the texts of a micro-batch lie one behind another in few rows.

A batch stays what it is without: the same examples, the same terms, the same loss and gradients up to the
order of floating-point sums. Only its form differs, and with it the draws of dropout.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.hf.packing import Way, way_of
from fedtune.model.base import Base
from fedtune.model.encode import Encoded
from fedtune.model.objectives.base import IGNORED
from fedtune.model.settings import TrainSettings

OWNERS = "owners"  # of a packed batch: (rows, tokens) which of its texts a token is of; -1 is padding
Batch = dict[str, torch.Tensor]
Rows = list[list[int]]  # the texts of each row, by number


def require(train: TrainSettings, base: Base) -> None:
    """Raises C104 or M306 where a model lacks what the settings need."""
    train.require(base.tokenizer, base.name)
    if train.packing:
        require_packing(base)


def require_packing(base: Base) -> None:
    """Raises M306 for a model in which a text of a packed row does not score as it does alone."""
    if way(base) == "none":
        raise FedtuneError(
            "M306",
            f"method.train.packing with a {type(base.net).__name__}, in which a text of a packed row does "
            "not score as it does alone",
            "a language model that heeds positions or masks of packed rows, such as Llama, Qwen or GPT-2",
            "set method.train.packing = false",
        )


def way(base: Base) -> Way:
    """How this model is told of packed rows; it is tried once."""
    if base.packing is None:
        base.packing = way_of(base.net, base.tokenizer, base.context)
    return base.packing


def in_rows(encoded: Encoded) -> Encoded:
    """The same examples, in packed batches."""
    most = encoded.max_length

    def collate(indices: Sequence[int]) -> Batch:
        batch = encoded.collate(indices)
        rows = rows_of([lengths_of(batch)], most)
        return packed(batch, rows[0]) if rows else batch

    return replace(encoded, collate=collate)


def lengths_of(batch: Batch) -> list[int]:
    lengths: list[int] = batch["attention_mask"].sum(1).tolist()
    return lengths


def rows_of(groups: Sequence[Sequence[int]], most: int) -> list[Rows] | None:
    """For each group of texts of these lengths its rows, as many for every group: those that take the fewest
    places (rows times the fullest one), of equals the narrowest, and none fuller than `most` tokens or the
    longest text. None where every text gets a row of its own."""
    largest = max(map(len, groups))
    longest = max(max(lengths) for lengths in groups)
    best: tuple[int, int, list[Rows]] | None = None
    for count in range(1, largest + 1):
        plans = [spread(lengths, count) for lengths in groups]
        width = fullest(groups, plans)
        if width <= max(most, longest) and (best is None or (count * width, width) < best[:2]):
            best = count * width, width, plans
    assert best is not None  # a row for each text is as wide as the longest
    return best[2] if len(best[2][0]) < largest else None


def fullest(groups: Sequence[Sequence[int]], plans: Sequence[Rows]) -> int:
    """Tokens of the row that has most."""
    return max(
        sum(lengths[text] for text in row)
        for lengths, rows in zip(groups, plans, strict=True)
        for row in rows
    )


def spread(lengths: Sequence[int], count: int) -> Rows:
    """Long texts first, each into the row that is emptiest (Graham 1969's longest processing time)."""
    rows: Rows = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        tokens, row = heapq.heappop(filled)
        rows[row].append(text)
        heapq.heappush(filled, (tokens + lengths[text], row))
    return [sorted(row) for row in rows]


def packed(batch: Batch, rows: Rows, width: int = 0) -> Batch:
    """A padded batch of texts in these rows: input_ids, labels and owners (rows, tokens), without a mask. The
    first token of a text is no target, as it is none alone. Whatever else is in the batch stays."""
    shown = batch["attention_mask"].numpy() > 0
    lengths = shown.sum(1)
    width = max(width, *(int(lengths[row].sum()) for row in rows))
    ids = np.zeros((len(rows), width), np.int64)
    labels, owners = np.full_like(ids, IGNORED), np.full_like(ids, -1)
    for place, row in enumerate(rows):
        start = 0
        for text in row:
            own, here = shown[text], slice(start, start + lengths[text])
            ids[place, here] = batch["input_ids"].numpy()[text, own]
            labels[place, here] = batch["labels"].numpy()[text, own]
            labels[place, start], owners[place, here] = IGNORED, text
            start += int(lengths[text])
    made = {"input_ids": ids, "labels": labels, OWNERS: owners}
    rest = {name: value for name, value in batch.items() if name != "attention_mask"}
    return rest | {name: torch.from_numpy(value) for name, value in made.items()}


def shown_in(batch: Batch) -> torch.Tensor:
    """Which tokens of a batch of texts are not padding, (rows, tokens) bool: all of them without a mask."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask > 0


def owners_of(batch: Batch) -> np.ndarray:
    """Which text of a batch each token is of, -1 for padding: (rows, tokens)."""
    if OWNERS in batch:
        owners: np.ndarray = batch[OWNERS].cpu().numpy()
        return owners
    shown = shown_in(batch).cpu().numpy()
    return np.where(shown, np.arange(len(shown))[:, None], -1)


def texts_apart(owners: torch.Tensor, labels: torch.Tensor, *logits: torch.Tensor) -> list[torch.Tensor]:
    """Labels (rows, tokens - 1) and logits (rows, tokens - 1, ...) of packed rows, each text in a row of its
    own, as without packing."""
    of = owners.cpu().numpy()
    same = of[:, 1:] == of[:, :-1]
    places = [np.flatnonzero(same & (of[:, 1:] == text)) for text in range(of.max() + 1)]
    at = np.full((len(places), max(map(len, places))), -1)
    for text, own in enumerate(places):
        at[text, : len(own)] = own
    there = torch.from_numpy(at).to(labels.device)
    taken = [value.flatten(0, 1)[there.clamp_min(0)] for value in (labels, *logits)]
    return [torch.where(there >= 0, taken[0], IGNORED), *taken[1:]]
