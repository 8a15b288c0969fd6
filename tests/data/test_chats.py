"""Conversations in the forms of public data sets: one list of {role, content, ...} from all of them, or a
sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import config
from fedtune.data.chats import messages, tools
from fedtune.data.rows import clean
from fedtune.errors import FedtuneError
from tests.tables import data_of

WANT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "fox"}}}
ANSWERED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "form",
    [
        WANT,
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
        [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "ho"}],
        [{"role": "human", "content": "hi"}, {"role": "model", "content": "ho"}],
        [{"role": "user", "content": PARTS}, {"role": "assistant", "content": ["h", {"text": "o"}]}],
        [{"role": "user", "content": {"type": "text", "text": "hi"}}, {"role": "assistant", "content": "ho"}],
        json.dumps(WANT),
        str(WANT),  # as pandas writes a list into a cell
        np.asarray(WANT, dtype=object),  # as pandas reads Parquet
        [
            turn | {"name": None, "tool_calls": None, "from": None} for turn in WANT
        ],  # a table's schema fills what a row lacks
        [turn | {"tool_calls": [], "reasoning_content": ""} for turn in WANT],
        {"role": ["user", "assistant"], "content": ["hi", "ho"]},
        {"from": np.asarray(["human", "gpt"]), "value": np.asarray(["hi", "ho"])},
        [{"role": "system", "content": None}, *WANT],
        [WANT[0], {"role": "assistant", "content": None, "tool_calls": []}, WANT[1]],
    ],
)
def test_one_conversation_in_many_forms(form: Any) -> None:
    assert messages(form, "here") == WANT


def test_tool_calls_in_many_forms() -> None:
    asked = {"role": "user", "content": "hi"}
    arguments = {"name": "find", "arguments": {"what": "fox"}}
    for answer in (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [arguments]},
        {"role": "assistant", "content": None, "function_call": arguments},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": None}], "refusal": None},
        {"from": "function_call", "value": json.dumps(arguments)},
    ):
        assert messages([asked, answer, {"from": "observation", "value": "here"}], "here") == [
            asked,
            ANSWERED,
            {"role": "tool", "content": "here"},
        ]
    text = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "find", "arguments": '{"what": null}'}}],
    }
    assert messages([asked, text], "here")[1]["tool_calls"] == text["tool_calls"]  # type: ignore[index]
    thought = {"role": "assistant", "content": "ho"}
    for key in ("reasoning", "thinking", "reasoning_content"):
        assert messages([asked, thought | {key: "so"}], "here") == [
            asked,
            thought | {"reasoning_content": "so"},
        ]
    result = {"role": "tool", "content": "x", "tool_call_id": "7", "name": "find"}
    assert messages([asked, ANSWERED, result], "here") == [asked, ANSWERED, result]
    assert tools(None, "") == tools("", "") == tools("[]", "") == tools([], "") == []
    assert tools(json.dumps([CALL]), "") == tools([CALL], "") == tools(CALL, "") == [CALL]


def test_conversations_in_which_the_assistant_says_nothing_are_none() -> None:
    assert messages([WANT[0]], "here") is None
    assert messages([WANT[0], {"role": "assistant", "content": " "}], "here") is None
    assert messages([WANT[0], {"role": "assistant", "content": None}, *WANT], "here") == [
        WANT[0],
        {"role": "assistant", "content": ""},
        *WANT,
    ]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("hello", ["str 'hello'", "here", "role and content"]),
        ("[hello", ["str '[hello'"]),
        ([], ["list []"]),
        (["hi", "ho"], ["list ['hi', 'ho']"]),
        ([{"content": "hi"}], ["message 1 in here", "role"]),
        ([WANT[0], {"role": "user", "content": None}, WANT[1]], ["message 2 in here", "nothing as content"]),
        ([{"role": "user", "content": 5}], ["int 5"]),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, WANT[1]],
            ["'image_url'", "parts of text"],
        ),
        ([WANT[0], {"role": "assistant", "content": [{"type": "tool_use", "name": "find"}]}], ["'tool_use'"]),
        ([WANT[0], {"role": "assistant", "tool_calls": [{"id": "x"}]}], ["the tool call", "message 2"]),
        ([{"role": "user", "content": "\ud800"}, WANT[1]], ["lone surrogate"]),
    ],
)
def test_what_is_no_conversation_is_a_sentence(form: Any, named: list[str]) -> None:
    with pytest.raises(FedtuneError) as caught:
        messages(form, "here")
    assert caught.value.code == "D203" and all(name in str(caught.value) for name in named)


def test_csv_parquet_and_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [WANT[0], ANSWERED], "tools": [CALL]},
        {"messages": WANT, "tools": []},
        {"messages": [WANT[0]], "tools": []},
    ]
    want = [rows[0], {"messages": WANT}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, write in (
        ("a.csv", str),
        ("b.csv", json.dumps),
    ):  # as pandas writes a list, and as everybody else does
        with (tmp_path / name).open("w", newline="") as file:
            table = csv.DictWriter(file, ["messages", "tools"])
            table.writeheader()
            table.writerows({key: write(value) for key, value in row.items()} for row in rows)
    for name in ("a.jsonl", "a.parquet", "a.csv", "b.csv"):
        data = data_of(
            source=name.partition(".")[2], path=str(tmp_path / name), task="instruct", messages="messages"
        )  # type: ignore[arg-type]
        found = clean(data, data.table().rows, name)
        assert (found.rows, found.blank) == (want, 1), name


def test_a_text_with_columns_in_braces_is_the_prompt() -> None:
    row = {"instruction": "add", "input": "2+2", "output": "four"}
    data = data_of(
        task="instruct",
        prompt="instruction",
        response="output",
        template="Task: {prompt}\n{input}\nAnswer: {response}",
    )
    assert clean(data, [row], "here").rows == [{"prompt": "Task: add\n2+2\nAnswer: ", "response": "four"}]
    assert clean(data, [row | {"input": None}], "here").rows[0]["prompt"] == "Task: add\n\nAnswer: "
    with pytest.raises(FedtuneError, match=r"D204.*'inputs'.*data.template"):
        clean(data.model_copy(update={"template": "{inputs}:"}), [row], "here")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"template": "Question:"}, ["C102", "data.template"]),
        ({"template": "{response} is the answer to {prompt}"}, ["C104", "{response}"]),
        ({"template": "plain", "messages": "messages"}, ["C104", "data.messages"]),
        ({"template": "Q: {prompt}", "system": "be kind"}, ["C104", "data.system"]),
        ({"task": "causal-lm", "system": "be kind"}, ["C104", "data.task"]),
        ({"date": "tomorrow"}, ["C102", "data.date"]),
    ],
)
def test_keys_that_nothing_would_use(data: dict[str, Any], named: list[str]) -> None:
    tree = {"data": {"source": "jsonl", "path": "x", "task": "instruct", **data}, "partition": {"by": "iid"}}
    with pytest.raises(FedtuneError) as caught:
        config.parse(tree)
    assert all(name in str(caught.value) for name in named)
