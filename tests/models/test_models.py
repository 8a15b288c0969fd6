"""docs/models.md is what happens: a handful of families here, all of them in the slow test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.families import FAMILIES, TASKS
from tests.models.outcome import KINDS, METHODS, outcomes
from tests.models.record import COLUMNS, FAULT, held

# families that differ in what they are: side of the class token, padding, cache, stages, batch norm
HANDFUL = [
    ("BERT", "classify", ("lora", "prefix", "prompt, deep")),
    ("RoBERTa", "classify", ("lora", "p-tuning")),
    ("DeBERTa v2", "classify", ("lora", "prompt, deep", "sfprompt")),
    ("XLNet", "classify", ("lora", "prefix")),
    ("GPT-2", "causal-lm", ("lora", "ia3", "head")),
    ("Gemma 3", "instruct", ("lora", "prefix")),
    ("Qwen 3", "classify", ("lora", "bias", "p-tuning")),
    ("Mamba 2", "causal-lm", ("lora", "prefix")),
    ("MPNet", "classify", ("lora", "sfprompt")),
    ("T5", "classify", ("lora", "prompt", "sfprompt")),
    ("T5", "causal-lm", ("lora",)),
    ("ResNet", "image-classify", ("lora", "head", "full", "sfprompt")),
    ("Swin", "image-classify", ("lora", "prompt")),
    ("CLIP", "image-classify", ("lora", "prompt")),
    ("SwiftFormer", "image-classify", ("lora",)),  # a batch norm in the head
    ("ImageGPT", "image-classify", ("lora",)),
]


def short(outcome: str) -> str:
    """works, or the code: sentences may change with a version of transformers or peft."""
    return outcome.partition(":")[0]


@pytest.mark.parametrize(
    ("name", "task", "columns"), HANDFUL, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_recorded_outcomes_hold(name: str, task: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    found = outcomes(name, task, tmp_path, columns)
    assert {column: short(outcome) for column, outcome in found.items()} == {
        column: short(held()[name][task][column]) for column in columns
    }, found


def test_the_record_is_whole() -> None:
    assert (*KINDS, *METHODS) == COLUMNS
    assert {name: set(rows) for name, rows in held().items()} == {
        name: set(TASKS[family.side]) for name, family in FAMILIES.items()
    }
    assert all(tuple(row) == COLUMNS for rows in held().values() for row in rows.values())


def test_whatever_is_refused_is_refused_in_a_sentence() -> None:
    faults = [
        (name, task, column)
        for name, rows in held().items()
        for task, row in rows.items()
        for column in row
        if row[column].startswith(FAULT)
    ]
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_recorded_outcomes_hold(name: str, tmp_path: Path) -> None:
    for number, task in enumerate(TASKS[FAMILIES[name].side]):
        place = tmp_path / f"{number}"
        place.mkdir()
        found = outcomes(name, task, place)
        assert {column: short(outcome) for column, outcome in found.items()} == {
            column: short(outcome) for column, outcome in held()[name][task].items()
        }, found
