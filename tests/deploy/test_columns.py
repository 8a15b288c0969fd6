"""--map: a site's columns under the recipe's names; and where a site maps columns, a recipe reaches those and
no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.sites import at_site, columns_of
from fedtune.errors import FedtuneError
from tests import small

MINE = [
    {
        "note": f"the fox {n}",
        "icd": sorted(small.WORDS)[n % 3],
        "patient": f"Anna {n}",
        "q": f"what {n}",
        "a": f"that {n}",
    }
    for n in range(12)
]
PLAIN = {"data__labels": sorted(small.WORDS), "deploy__sites": ["site-a"], "data__client_test_share": 0.25}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MINE))
    return path


def read(rows: Path, mapping: str, **changes: Any) -> list[dict[str, Any]]:
    recipe = small.recipe(Path("bert"), Path("elsewhere.jsonl"), **{**PLAIN, **changes})
    mine = at_site(recipe, 0, str(rows), columns=columns_of(mapping)).clients[0]
    return [*mine.train, *mine.test]


def test_a_sites_columns_stand_in_for_the_recipes(rows: Path) -> None:
    got = read(rows, "text=note, label=icd")
    assert sorted(row["text"] for row in got) == sorted(row["note"] for row in MINE) and {
        row["label"] for row in got
    } == set(small.WORDS)
    got = read(rows, "question=q,response=a", data__task="instruct", data__labels=[], data__prompt="question")
    assert all(set(row) == {"prompt", "response"} for row in got) and any(
        row["prompt"] == "what 3" for row in got
    )
    got = read(
        rows, "chosen=a,rejected=note,prompt=q", data__task="preference", data__labels=[],
        method__train__objective={"loss": "orpo"},
    )  # fmt: skip
    assert {"prompt": "what 3", "chosen": "that 3", "rejected": "the fox 3"} in got
    got = read(
        rows, "case=note,response=a", data__task="instruct", data__labels=[], data__template="Case {case}: "
    )
    assert any(row["prompt"] == "Case the fox 3: " for row in got)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__label": "patient"},
        {"data__text": "patient"},
        {"data__text": "note"},
        {"data__task": "instruct", "data__labels": []},
        {"data__task": "instruct", "data__labels": [], "data__template": "{patient}"},
        {"data__task": "instruct", "data__labels": [], "data__messages": "patient"},
    ],
)
def test_a_recipe_reaches_no_other_column(changes: dict[str, Any], rows: Path) -> None:
    with pytest.raises(FedtuneError, match="F507: found a recipe that reads column"):
        read(
            rows,
            "text=note,label=icd,response=a,prompt=q"
            if "data__template" in changes
            else "text=note,label=icd",
            **changes,
        )


@pytest.mark.parametrize("text", ["text", "text=", "=note", "text=note,label", ",="])
def test_a_mapping_that_is_none_is_a_sentence(text: str) -> None:
    with pytest.raises(FedtuneError, match="C103: found --map"):
        columns_of(text)
    assert columns_of("") == {} and columns_of("a=b") == {"a": "b"}
