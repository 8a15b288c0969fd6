"""Preference rows in the forms in which public data sets keep them become one form; what decides nothing is left
out and counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedtune.data.federation import load
from fedtune.data.rows import UNDECIDED, clean
from fedtune.data.sources.docstring_questions import DocstringQuestions
from fedtune.errors import FedtuneError
from tests.tables import data_of, partition_of


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(row: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    data = data_of("jsonl", path="x", task="preference", **options)
    return list(clean(data, [row], "here").rows)


TEXTS = {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."}
TALK = {"prompt": [user("Is it?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}


@pytest.mark.parametrize(
    ("row", "options", "want"),
    [
        (TEXTS, {}, TEXTS),
        ({"chosen": "Is it? Yes.", "rejected": "Is it? No."}, {"prompt": ""}, TEXTS),
        ({"q": "Is it?", "good": " Yes.", "bad": " No."},
         {"prompt": "q", "chosen": "good", "rejected": "bad"}, TEXTS),
        ({**TEXTS, "prompt": "it"}, {"template": "Is {prompt}?"}, TEXTS),
        (TALK, {}, TALK),
        ({key: json.dumps(value) for key, value in TALK.items()}, {}, TALK),
        ({"chosen": [user("Is it?"), assistant("Yes.")], "rejected": [user("Is it?"), assistant("No.")]},
         {"prompt": ""}, TALK),
        # a text beside conversations that hold it, as in HuggingFaceH4/ultrafeedback_binarized
        ({"prompt": "Is it?", "chosen": [user("Is it?"), assistant("Yes.")],
          "rejected": [user("Is it?"), assistant("No.")]}, {}, TALK),
        ({"prompt": "Is it?", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}, {}, TALK),
        ({"chosen": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}],
          "rejected": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "No."}]},
         {"prompt": ""}, TALK),
    ],
)  # fmt: skip
def test_all_forms_become_one(row: dict[str, Any], options: dict[str, Any], want: dict[str, Any]) -> None:
    assert read(row, **options) == [want]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({**TEXTS, "rejected": " "}, {}),
        ({**TEXTS, "rejected": " Yes."}, {}),
        ({"chosen": "Is it?", "rejected": "Is it?"}, {"prompt": ""}),
        ({**TALK, "rejected": [assistant("")]}, {}),
        ({**TALK, "rejected": TALK["chosen"]}, {}),
    ],
)
def test_what_decides_nothing_is_left_out(row: dict[str, Any], options: dict[str, Any]) -> None:
    assert read(row, **options) == []


def test_why_is_counted(tmp_path: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [TEXTS | {"chosen": f" Yes {n}."} for n in range(9)] + [{**TEXTS, "rejected": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of("jsonl", path=str(path), task="preference")
    found = load(data, partition_of("iid", clients=3), 1)
    assert found.dropped == {UNDECIDED: 1} and found.labels == ()


def test_a_column_that_is_missing_says_what_may_be_meant() -> None:
    with pytest.raises(FedtuneError, match=r"D204.*no column 'prompt'.*or set it to \"\" where both"):
        read({"chosen": "a", "rejected": "b"})
    with pytest.raises(FedtuneError, match=r"D204.*no column 'rejected'"):
        read({"prompt": "a", "chosen": "b"})
    with pytest.raises(FedtuneError, match=r"D203.*the rejected response in row 1"):
        read({**TALK, "rejected": "No."})


def test_built_in_pairs_are_of_a_question_and_the_same_every_time() -> None:
    source = DocstringQuestions(task="preference", packages=("networkx",), per_package=20)
    rows = list(source.table().rows)
    assert rows == list(source.table().rows) and len(rows) == 20
    answers = [row["chosen"] for row in rows]
    for number, row in enumerate(rows):
        assert row["prompt"].startswith("What is `")
        if number % 2:
            assert answers[number].startswith(row["rejected"]) and len(row["rejected"]) < len(answers[number])
        else:
            assert row["rejected"] == answers[(number + 1) % 20]
