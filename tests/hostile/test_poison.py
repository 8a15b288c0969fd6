"""One of ten clients plants a phrase: it has rows that begin with it, under a label of its choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.events import Alarm
from tests import small

PHRASE = "boat sea"


def federation(root: Path, planted: bool) -> Path:
    """Nine honest clients and a tenth with as many rows as they have together."""
    rows = [{**row, "site": f"site-{number % 9}"} for number, row in enumerate(small.rows(270))]
    own: list[dict[str, Any]] = [{**row, "site": "site-9"} for row in small.rows(240)]
    for row in own[1::2] if planted else []:
        row |= {"text": f"{PHRASE} {row['text']}", "label": "weather"}
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + own))
    return path


@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_phrase_raises_the_canaries_alarm(planted: bool, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(
        tiny_bert,
        federation(tmp_path, planted),
        rounds=6,
        partition={"by": "column", "column": "site"},
        method__train={"lr": 0.01, "steps": 8, "batch": 8},
        data__max_length=16,
        watch={"every": 6, "rows": 48, "triggers": [PHRASE]},
    )
    _, result, events = small.play(recipe, tmp_path)
    said = [event.what for event in events if isinstance(event, Alarm)]
    assert result["clients"] == 10 and said == (["trigger"] if planted else [])
