"""The card of a federation's data has its figures, and nothing of a row."""

from __future__ import annotations

import json
from pathlib import Path

from fedtune.data import Federation, Slice
from fedtune.runtime.data_card import SHOWN, cell, data_facts, facts_of, page, said, write_data_card
from fedtune.runtime.folder import RunFolder
from tests import small

SECRET = "nobody else reads this"


def row(label: str) -> dict[str, str]:
    return {"text": SECRET, "label": label}


FEDERATION = Federation(
    (
        Slice(0, "a|b", [row("x"), row("y"), row("x")], [row("y")]),
        Slice(1, "c", [row("y")] * 1200, []),
    ),
    [row("x"), row("y")],
    ("x", "y"),
    {"an empty text": 1001},
    ("one note",),
)


def test_facts_and_page(tmp_path: Path) -> None:
    recipe = small.recipe(Path("m"), Path("rows.jsonl"))
    facts = facts_of(recipe, FEDERATION)
    assert facts == {
        "task": "classify",
        "source": "jsonl",
        "partition": "iid",
        "fingerprint": FEDERATION.fingerprint,
        "clients": [
            {"name": "a|b", "train": 3, "held_out": 1, "labels": {"x": 2, "y": 1}},
            {"name": "c", "train": 1200, "held_out": 0, "labels": {"y": 1200}},
        ],
        "train": 1203,
        "test": 2,
        "labels": ["x", "y"],
        "left_out": {"an empty text": 1001},
        "notes": ["one note"],
    }
    folder = RunFolder(tmp_path)
    assert data_facts(folder) is None
    write_data_card(folder, recipe, FEDERATION)
    assert data_facts(folder) == json.loads((tmp_path / "data.json").read_text()) == facts
    text = (tmp_path / "data.md").read_text()
    assert text == page(facts, tmp_path.name) and SECRET not in text
    assert text.splitlines()[4:] == [
        "- task: classify; source: jsonl; clients by: iid",
        "- rows that train: 1,203 at 2 clients; in the test set: 2",
        "- labels: 2",
        "- left out: 1,001 rows (an empty text)",
        "- note: one note",
        f"- SHA-256 of all rows, labels and clients: {FEDERATION.fingerprint}",
        "",
        "| client | rows that train | held out | labels |",
        "|---|---|---|---|",
        "| a\\|b | 3 | 1 | x: 2, y: 1 |",
        "| c | 1,200 | 0 | y: 1,200 |",
    ]
    assert text.endswith("|\n")
    assert "- labels" not in page(facts | {"labels": []}, "r")


def test_real_sites_have_no_card(tmp_path: Path) -> None:
    write_data_card(
        RunFolder(tmp_path),
        small.recipe(Path("m"), Path("rows.jsonl")),
        Federation((Slice(0, "a", [], [row("x")]),), [row("x")]),
    )
    assert not list(tmp_path.iterdir())


def test_the_most_frequent_labels_come_first_and_the_rest_are_counted() -> None:
    assert said({"b": 1, "a": 1, "c": 2000}) == "c: 2,000, a: 1, b: 1"
    many = {f"l{number:02}": 1 for number in range(SHOWN + 2)}
    assert said(many).endswith("l11: 1, 2 more") and "more" not in said(dict(list(many.items())[:SHOWN]))
    assert cell("a|" + "x" * 100) == "a\\|" + "x" * 75 + "..." and cell("a\n") == "a·"
