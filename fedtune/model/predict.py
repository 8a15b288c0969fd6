"""What a tuned model says of rows whose answers nobody knows: probabilities of labels, or responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.model.encode import encode
from fedtune.model.generate import Question, generated, questions
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.tunable import TunableModel

Row = Mapping[str, Any]
UNKNOWN = "?"  # where a row of the task's shape has its answer


def classes_of(tunable: TunableModel, rows: Sequence[Row], batch: int, **how: Any) -> list[dict[str, float]]:
    """Label -> probability of every row of {text} or {image}, in their order; `how` as in `encode`."""
    labels = tunable.base.labels
    encoded = encode([{**row, "label": labels[0]} for row in rows], tunable.base, **how)
    order = encoded.by_length()
    found: dict[int, dict[str, float]] = {}
    tunable.net.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            with autocast(tunable, "off"):
                arguments, _ = inputs_of(tunable, encoded.collate(numbers))
                logits = tunable.net(**arguments).logits
            shares = logits.float().softmax(-1).tolist()
            found |= {n: dict(zip(labels, row, strict=True)) for n, row in zip(numbers, shares, strict=True)}
    return [found[number] for number in range(len(rows))]


def responses_of(
    tunable: TunableModel, rows: Sequence[Row], tokens: int, batch: int, **how: Any
) -> list[str]:
    """Greedy responses to {prompt} or to {messages} that end with the user; `how`: template, system, day."""
    return generated(tunable, asked_of(tunable, rows, **how), tokens, batch)


def asked_of(tunable: TunableModel, rows: Sequence[Row], **how: Any) -> list[Question]:
    asked = []
    for row in rows:
        if "messages" in row:
            row = {**row, "messages": [*row["messages"], {"role": "assistant", "content": UNKNOWN}]}
        asked.append(row if "messages" in row else {**row, "response": UNKNOWN})
    return questions(asked, tunable, **how)


def refuse_unpredictable(task: str) -> None:
    """Raises M306 for a task without a label, or without a prompt."""
    if task in ("causal-lm", "preference"):
        raise FedtuneError(
            "M306",
            f"predictions of a model of data.task = '{task}' without a column of prompts",
            "a classifier, or a model of instruct",
            "score it with fedtune eval, or generate with fedtune.load",
        )
