"""Built-in questions: the same in every process, one answer each, none about what is private."""

from __future__ import annotations

import pytest

from fedtune.data.sources.docstring_questions import DocstringQuestions, questions
from fedtune.errors import FedtuneError


def test_questions_are_named_answered_and_the_same_every_time() -> None:
    source = DocstringQuestions(task="instruct", packages=("networkx", "sympy"), per_package=20)
    rows = list(source.table().rows)
    assert [row["package"] for row in rows] == ["networkx"] * 20 + ["sympy"] * 20
    assert len({row["response"].lower() for row in rows}) == 40
    for row in rows:
        name = row["prompt"].split("`")[1]
        assert row["prompt"] == f"What is `{name}` in {row['package']} for?"
        assert not any(part.startswith("_") for part in name.split("."))
        assert 4 <= len(row["response"].split()) <= 40 and "\n" not in row["response"]
    assert list(source.table().rows) == rows


def test_a_package_that_is_missing_is_one_sentence() -> None:
    with pytest.raises(FedtuneError, match=r"D208: .*'no_such_package_here'"):
        next(questions("no_such_package_here", 1))
