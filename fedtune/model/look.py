"""What rows look like to a model, before any weights are read: how many tokens they have, and which of them
carry loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from fedtune.hf.config import locate
from fedtune.hf.tokenizer import load_tokenizer
from fedtune.model.base import Base, context_of, reading
from fedtune.model.encode import Encoded, encode
from fedtune.model.memory_plan import weightless
from fedtune.model.objectives.base import IGNORED
from fedtune.model.settings import ModelSettings

WHOLE = 1 << 30  # a length that cuts nothing


@dataclass(frozen=True)
class Looked:
    """Rows, as a model is given them.

    lengths   tokens of each row before anything is cut, in the rows' order; those of images are 1
    context   the longest input that configuration and tokenizer allow; None: nothing limits it
    examples  of the first rows, cut as they would be trained on: pieces of text, each with whether it carries
              loss
    unshown   key of chat messages -> rows that have it, where the chat template does not show it
    """

    lengths: list[int]
    context: int | None
    examples: list[list[tuple[str, bool]]]
    unshown: Mapping[str, int]


def with_tokenizer(model: ModelSettings, task: str, labels: Sequence[str]) -> Base:
    """The base without weights, and its tokenizer or image processor. Raises M301."""
    base = weightless(model, task, labels)
    with reading(model.name):
        known = {"revision": model.revision} if model.revision else {}
        base.tokenizer = load_tokenizer(locate(model.name), task, known)
    return base


def look(
    model: ModelSettings,
    task: str,
    labels: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    shown: int,
    **how: Any,
) -> Looked:
    """Rows in the task's shape, of which the first `shown` are cut and written out; `how` as in `encode`.
    Raises M301, and what `encode` raises."""
    base = with_tokenizer(model, task, labels)
    context = None if task == "image-classify" else context_of(base.net, base.tokenizer)
    if task == "causal-lm":  # a stream of tokens has no rows: they are counted alone, and shown as blocks
        ids = base.tokenizer([str(row["text"]) for row in rows], add_special_tokens=False)["input_ids"]
        lengths, unshown = [len(line) for line in ids], {}
    else:
        whole = encode(rows, base, **how | {"max_length": WHOLE, "overlong": "cut"})
        lengths, unshown = [whole.length(number) for number in range(len(whole))], dict(whole.unshown)
    cut = encode(rows[:shown], base, **how | {"overlong": "cut"})
    return Looked(lengths, context, written(base, cut)[:shown] if shown else [], unshown)


def written(base: Base, encoded: Encoded) -> list[list[tuple[str, bool]]]:
    """Each example as pieces of text, each with whether its tokens carry loss; [] for an image."""
    return [pieces(base, encoded[number]) for number in range(len(encoded))]


def pieces(base: Base, example: Mapping[str, np.ndarray]) -> list[tuple[str, bool]]:
    if "input_ids" not in example:
        return []
    if "rejected_input_ids" in example:
        worse = {name: example[f"rejected_{name}"] for name in ("input_ids", "labels")}
        said = [piece for piece in pieces(base, worse) if piece[1]]
        return [*pieces(base, {name: example[name] for name in worse}), (" rather than ", False), *said]
    ids, labels = example["input_ids"].tolist(), example["labels"]
    # the first token is predicted from nothing, and so never carries loss
    lossy = [n > 0 and bool(label != IGNORED) for n, label in enumerate(labels)] if labels.ndim else []
    known = lossy or [False] * len(ids)
    runs = groupby(zip(ids, known, strict=True), key=lambda pair: pair[1])
    return [(base.tokenizer.decode([token for token, _ in run]), carries) for carries, run in runs]
