"""One of ten clients does harm: what it sends is refused or bounded, by name, and the run goes on; a phrase that
it plants raises the canaries' alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.events import Alarm, ClientLeftOut, Shortened
from tests import small
from tests.hostile.poisoners import Poison, all_values, poisoned, sign_flip, weighs
from tests.marks import mostly_thorough

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


@pytest.mark.thorough
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


BAD = 3
POISONS: dict[str, tuple[Poison, str]] = {
    "NaN": (all_values(float("nan")), "W607"),
    "Inf": (all_values(float("inf")), "W607"),
    "1e30": (all_values(1e30), "W607"),
    "a weight of 1e12": (weighs(1e12), "W606"),
    "a negative weight": (weighs(-4.0), "W607"),
    "the sign turned, ten times": (sign_flip(10.0), ""),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"), 150)


@pytest.mark.parametrize("what", mostly_thorough(POISONS, ["NaN", "a weight of 1e12"]))
def test_one_of_ten_is_refused_or_bounded_by_name_and_the_run_goes_on(
    what: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    poison, code = POISONS[what]
    recipe = small.recipe(
        tiny_bert, data, rounds=2, partition={"by": "iid", "clients": 10}, limits={"clip": 1.5}
    )
    _, result, events = small.play(recipe, tmp_path / "poisoned", carry=poisoned(BAD, poison))
    assert result["rounds"] == 2
    refused = [(e.name, e.code) for e in events if isinstance(e, ClientLeftOut)]
    bounded = {e.name for e in events if isinstance(e, Shortened)}
    if code:
        assert refused == [(f"client-{BAD}", code)] * 2
        gone = recipe.sampling.model_copy(update={"without": (f"client-{BAD}",)})
        _, clean, _ = small.play(recipe.model_copy(update={"sampling": gone}), tmp_path / "clean")
        assert result["state_sha256"] == clean["state_sha256"]  # nothing of it is in the state
    else:
        assert not refused and f"client-{BAD}" in bounded
