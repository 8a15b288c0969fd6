"""What `fedtune data` shows: the numbers, from rows that one can count, and the words around them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.model.look import Looked
from fedtune.runtime.data_view import (
    FEW,
    TRIED,
    ColumnSeen,
    DataSeen,
    columns_of,
    example_lines,
    label_lines,
    length_lines,
    lines,
    marked,
    seen,
    shortened,
    used,
)
from tests import small, tiny

NOTHING = Looked([], None, [], {})


def view_of(looked: Looked = NOTHING, rows: Any = (), **changes: Any) -> DataSeen:
    recipe = small.recipe(Path("m"), Path("rows.jsonl"), **changes)
    return DataSeen(recipe, "rows.jsonl", 1234, None, [], list(rows), {}, 0, (), looked)


def test_columns_are_counted_as_they_stand() -> None:
    rows = [{"a": 1, "b": ""}, {"a": "x", "c": None}, {"a": 1, "b": "z"}, {"c": []}]
    assert columns_of(rows) == [
        ColumnSeen("a", ("int", "str"), 3, 2, 1),
        ColumnSeen("b", ("str",), 1, 1, "z"),
        ColumnSeen("c", ("list",), 1, 1, []),
    ]
    assert columns_of([{"n": None}]) == [ColumnSeen("n", (), 0, 0, None)]


def known_words(text: str) -> str:
    """The first six words of a text, as far as the tiny tokenizer knows them."""
    known = set(" ".join(tiny.SENTENCES).split())
    return " ".join(word if word in known else "[UNK]" for word in text.split()[:6])


def test_the_view_of_a_file(tiny_bert: Path, tmp_path: Path) -> None:
    """From the file to the lines: columns, what is left out, what stands twice, labels, lengths, examples."""
    rows = [*small.rows(6), small.rows(6)[0], {"text": " ", "label": "music", "site": "site-0"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = seen(small.recipe(tiny_bert, data, data__max_length=8), examples=2)
    assert (view.read, view.test, len(view.rows), view.twice) == (8, None, 7, 1)
    assert dict(view.dropped) == {"an empty text, response or label": 1}
    assert view.looked.lengths == [9] * 7 and view.looked.context == 32 and len(view.looked.examples) == 2
    assert [(one.name, one.filled, one.different) for one in view.columns] == [
        ("text", 8, 7), ("label", 8, 3), ("site", 8, 4),
    ]  # fmt: skip
    said = list(lines(view))
    first = small.rows(1)[0]["text"]
    assert said[0] == f"data      {view.where} (jsonl): 8 rows"
    assert said[1] == f"  text   str         8 filled       7 different  {first}"
    assert said[3] == "  site   str         8 filled       4 different  site-0"
    assert said[4] == "task      classify: text = 'text', label = 'label'"
    assert said[5] == "left out  1 rows: an empty text, response or label"
    assert said[6].startswith("twice     1 rows equal an earlier one")
    assert said[7].startswith("labels    3, the rarest with 2 rows")
    assert said[8].split() == ["animals", "3", "█" * 12] and said[9].split() == ["music", "2", "█" * 8]
    assert said[11] == (f"tokens    of {tiny_bert}: 9 to 9, half at most 9, 95 % at most 9")
    assert said[12] == "cut       7 of 7 (100.0 %) are longer than data.max_length = 8"
    assert said[13] == "context   32 tokens at most"
    shown = [known_words(row["text"]) for row in view.rows[:2]]
    assert said[14:] == [
        "examples  as the model is given them",
        f"  1  [CLS] {shown[0]} [SEP]  -> {view.rows[0]['label']}",
        f"  2  [CLS] {shown[1]} [SEP]  -> {view.rows[1]['label']}",
    ]


def test_a_source_with_a_test_set_says_its_size() -> None:
    view = replace(view_of(), test=5678, columns=[ColumnSeen("a", (), 0, 0, None)], notes=("odd",))
    assert list(lines(view)) == [
        "data      rows.jsonl (jsonl): 1,234 rows, 5,678 more in its test set",
        "  a  nothing       0 filled       0 different  None",
        "task      classify: text = 'text', label = 'label'",
        "note      odd",
    ]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"data__task": "classify", "data__text": "t"}, {"text": "t", "label": "label"}),
        ({"data__task": "causal-lm"}, {"text": "text"}),
        ({"data__task": "instruct"}, {"prompt": "prompt", "response": "response"}),
        ({"data__task": "instruct", "data__messages": "m"}, {"messages": "m"}),
        ({"data__task": "image-classify"}, {"image": "image", "label": "label"}),
        (
            {"data__task": "preference", "method__train__objective": {"loss": "dpo"}},
            {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        ),
    ],
    ids=str,
)
def test_the_columns_of_a_task(changes: dict[str, Any], keys: dict[str, str]) -> None:
    assert used(view_of(**changes).recipe) == keys


def test_labels_are_bars_and_the_rarest_are_counted() -> None:
    counts = {f"l{n:02}": 1000 + n for n in range(FEW + 2)} | {"x" * 40: 1}
    said = list(label_lines(counts))
    assert said[0] == "labels    15, the rarest with 1 rows"
    assert (
        said[1] == f"  l13{' ' * 27}   1,013 {'█' * FEW}"
        and said[FEW] == f"  l02{' ' * 27}   1,002 {'█' * FEW}"
    )
    assert said[FEW + 1] == "  ... and 3 more" and len(said) == FEW + 2
    assert list(label_lines({"a": 2, "b": 100, "c": 50}))[1:] == [
        "  b     100 ████████████",
        "  c      50 ██████",
        "  a       2 █",
    ]
    assert not list(label_lines({}))
    assert len(list(label_lines(dict.fromkeys(map(str, range(FEW)), 1)))) == FEW + 1  # nothing more to say


def test_lengths_in_sentences() -> None:
    looked = Looked([*range(100, 0, -1)], 64, [], {"tools": 3})
    rows = [{}] * 2001
    assert list(length_lines(view_of(looked, rows, data__max_length=90))) == [
        "tokens    of m: 1 to 100, half at most 51, 95 % at most 96 (of the first 100)",
        "cut       10 of 100 (10.0 %) are longer than data.max_length = 90",
        "context   64 tokens at most",
        "note      3 rows have messages with 'tools', which the chat template does not show",
    ]
    stream = list(length_lines(view_of(Looked([7], None, [], {}), [{}], data__task="causal-lm")))
    assert stream == [
        "tokens    of m: 7 to 7, half at most 7, 95 % at most 7",
        "          one stream, cut into blocks of data.max_length = 12",
    ]
    assert not list(length_lines(view_of()))
    assert TRIED == 2000


def test_examples_mark_what_carries_loss() -> None:
    rows = [{"text": "a", "label": "x"}, {"image": "i" * 70}]
    looked = Looked([1, 1], None, [[("ask\nme", False), ("so\n", True)], []], {})
    plain = list(example_lines(view_of(looked, rows), colour=False))
    assert plain == [
        "examples  as the model is given them; «»: what carries loss",
        "  1  ask↵me«so↵»  -> x",
        f"  2  {'i' * 57}...",
    ]
    assert list(example_lines(view_of(looked, rows), colour=True))[:2] == [
        "examples  as the model is given them; green: what carries loss",
        "  1  ask↵me\x1b[32mso↵\x1b[0m  -> x",
    ]
    assert marked("a\x1b[0m", True, False) == "«a·[0m»"
    assert shortened("a\nb") == "a↵b" and shortened(["a"]) == "['a']"


def test_pictures_have_no_tokens() -> None:
    view = view_of(
        Looked([1, 1], None, [[], []], {}), [{"image": "a.png", "label": "x"}], data__task="image-classify"
    )
    said = list(lines(view))
    assert not any(line.startswith(("tokens", "cut", "context")) for line in said)
    assert said[-2:] == ["examples  as the model is given them", "  1  a.png  -> x"]
