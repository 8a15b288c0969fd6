"""Rows without a recipe: what their columns are taken for."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.data.guess import guess
from fedtune.errors import FedtuneError

SENTENCE = "the quick brown fox number {} jumps over the lazy dog"


def rows(count: int = 60, **columns: Any) -> list[dict[str, Any]]:
    return [
        {name: make(n) if callable(make) else make for name, make in columns.items()} for n in range(count)
    ]


def text(number: int) -> str:
    return SENTENCE.format(number)


def turn(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": text(number)}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("made", "task", "columns"),
    [
        ({"text": text, "label": lambda n: n % 3}, "classify", {"text": "text", "label": "label"}),
        ({"Note": text, "ward": lambda n: "ab"[n % 2]}, "classify", {"text": "Note", "label": "ward"}),
        ({"id": str, "review": text, "stars": lambda n: n % 5}, "classify", {"text": "review", "label": "stars"}),
        ({"title": lambda n: "t", "target": lambda n: "xy"[n % 2], "abstract": text}, "classify",
         {"text": "title", "label": "target"}),
        ({"prompt": text, "response": lambda n: "ok"}, "instruct", {"prompt": "prompt", "response": "response"}),
        ({"instruction": text, "input": "", "output": text}, "instruct",
         {"prompt": "instruction", "response": "output"}),
        ({"question": text, "answer": text}, "instruct", {"prompt": "question", "response": "answer"}),
        ({"question": text, "answer": lambda n: "ab"[n % 2]}, "classify", {"text": "question", "label": "answer"}),
        ({"turns": turn}, "instruct", {"messages": "turns"}),
        ({"conversations": lambda n: '[{"from": "human", "value": "a"}]'}, "instruct",
         {"messages": "conversations"}),
        ({"prompt": text, "chosen": text, "rejected": text, "score": lambda n: n}, "preference",
         {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        ({"Chosen": text, "Rejected": text}, "preference",
         {"prompt": "", "chosen": "Chosen", "rejected": "Rejected"}),
        ({"prompt": text, "chosen": turn, "rejected": turn}, "preference",
         {"prompt": "", "chosen": "chosen", "rejected": "rejected"}),
        ({"question": turn, "chosen": turn, "rejected": turn}, "preference",
         {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}),
        ({"file": lambda n: f"{n}.png", "label": lambda n: n % 2}, "image-classify",
         {"image": "file", "label": "label"}),
        ({"text": text}, "causal-lm", {"text": "text"}),
    ],
)  # fmt: skip
def test_columns_are_taken_for_what_they_are(
    made: dict[str, Any], task: str, columns: dict[str, str]
) -> None:
    found = guess(rows(**made))
    assert (found.task, found.columns) == (task, columns)


def test_a_task_that_is_said_is_kept() -> None:
    assert guess(rows(prompt=text, response=text), "causal-lm").columns == {"text": "prompt"}
    with pytest.raises(FedtuneError, match=r"D204.*'image-classify'.*an image and a label"):
        guess(rows(text=text, label="a"), "image-classify")
    with pytest.raises(FedtuneError, match="D204"):
        guess(rows(number=float))


def test_a_column_of_clients_needs_rows_for_each() -> None:
    made = {"text": text, "label": lambda n: n % 2}
    found = guess(rows(**made, site=lambda n: f"s{n % 4}"))
    assert (found.client, found.clients) == ("site", 4) and "partition.column = 'site'" in found.said
    assert guess(rows(**made, site=lambda n: f"s{n}")).client == ""  # one row each
    assert guess(rows(**made, site=lambda n: None if n == 7 else "ab"[n % 2])).client == ""
    assert guess(rows(**made, site="here")).client == ""
