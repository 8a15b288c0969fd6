"""What rows without a recipe are likely for: a task, its columns, and what could tell clients apart. A guess
that is said, so that its user corrects it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedtune.data.settings import Task
from fedtune.errors import FedtuneError

LOOKED_AT = 2000  # rows
PAIRS = (  # prompt and response, as published data sets call them
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
)
LOOSE_PAIRS = (  # the same, where the second may as well be a class
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("source", "target"),
)
WORTHS = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("preferred", "dispreferred"))
ASKED = ("prompt", "question", "instruction", "query", "input")  # before two responses
LABELS = ("label", "labels", "class", "category", "intent", "sentiment", "topic", "target", "y")
TEXTS = ("text", "sentence", "content", "body", "document", "review", "utterance", "query", "title", "note")
TALKS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
CLIENTS = (
    "site", "client", "hospital", "clinic", "bank", "branch", "institution", "organisation", "organization",
    "user", "author", "speaker", "device", "domain", "source", "region", "country", "folder",
)  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Guess:
    """A task, its keys of [data] with the columns that they name, and the column that could make clients
    (empty: none) with how many values it has."""

    task: Task
    columns: dict[str, str]
    client: str = ""
    clients: int = 0

    @property
    def said(self) -> str:
        """What was taken for what."""
        taken = [f"data.{key} = '{name}'" for key, name in self.columns.items()]
        return ", ".join([*taken, *([f"partition.column = '{self.client}'"] if self.client else [])])


@dataclass(frozen=True)
class Column:
    """What the first rows have in one column."""

    name: str
    values: list[Any]

    @property
    def texts(self) -> list[str]:
        return [value for value in self.values if isinstance(value, str) and value.strip()]

    @property
    def length(self) -> float:
        """Mean characters."""
        return sum(map(len, self.texts)) / len(self.texts) if self.texts else 0.0

    @property
    def kinds(self) -> set[str]:
        """Different values that can be a name: texts, whole numbers, truth values."""
        return {str(value) for value in self.values if isinstance(value, (str, int)) and str(value).strip()}

    @property
    def names_things(self) -> bool:
        """Whether few short values come again and again, as labels and clients do."""
        filled = sum(value not in (None, "") for value in self.values)
        return 2 <= len(self.kinds) <= max(2, min(200, filled // 2)) and (self.length < 60)

    @property
    def talks(self) -> bool:
        """Whether it holds lists of messages, as lists or as JSON text."""
        return any(is_talk(value) for value in self.values[:20])

    @property
    def pictures(self) -> bool:
        return any(
            (isinstance(value, str) and PurePath(value).suffix.lower() in PICTURES)
            or (isinstance(value, Mapping) and "bytes" in value)
            for value in self.values[:20]
        )


def is_talk(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and bool({"role", "from"} & first.keys())


def guess(rows: Sequence[Mapping[str, Any]], task: str = "") -> Guess:
    """What the rows are for; with `task`, which columns serve it. Raises D204 where no column does."""
    columns = [Column(name, [row.get(name) for row in rows[:LOOKED_AT]]) for name in names_of(rows)]
    tasks = [task] if task else ["preference", "instruct", "image-classify", "classify", "causal-lm"]
    for one in tasks:
        found = dict(FINDERS[one](columns))
        if found:
            client = client_of(columns, set(found.values()))
            more = (client.name, len(client.kinds)) if client else ("", 0)
            return Guess(one, found, *more)  # type: ignore[arg-type]
    have = ", ".join(column.name for column in columns) or "no column"
    raise FedtuneError(
        "D204",
        f"no columns for {f'data.task = {task!r}' if task else 'any task'} among {have}",
        NEEDED.get(task, "a text, a text with a label, a prompt with its response, or chat messages"),
        "rename the columns, or name them in the recipe's [data]",
    )


NEEDED = {
    "preference": "a chosen and a rejected response, with their prompt or without",
    "instruct": "a prompt and its response, or chat messages",
    "image-classify": "an image and a label",
    "classify": "a text and a label",
    "causal-lm": "a text",
}


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All columns, in the order in which they come."""
    return list(dict.fromkeys(str(name) for row in rows[:LOOKED_AT] for name in row))


def named(columns: Sequence[Column], words: Sequence[str]) -> list[Column]:
    """Columns that are called like one of the words, in the order of the words."""
    return [column for word in words for column in columns if column.name.lower() == word]


def preference(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    """A prompt of text beside conversations is in them as well, as a rule: then no column is named."""
    for better, worse in WORTHS:
        chosen, rejected = named(columns, [better]), named(columns, [worse])
        if not chosen or not rejected or chosen[0].talks != rejected[0].talks:
            continue
        asked = named([one for one in columns if one.talks == chosen[0].talks], ASKED)
        yield "prompt", asked[0].name if asked else ""
        yield "chosen", chosen[0].name
        yield "rejected", rejected[0].name
        return


def instruct(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    talks = [column for column in [*named(columns, TALKS), *columns] if column.talks]
    if talks:
        yield "messages", talks[0].name
        return
    for prompt, response in (*PAIRS, *LOOSE_PAIRS):
        asked, answered = named(columns, [prompt]), named(columns, [response])
        loose = (prompt, response) in LOOSE_PAIRS
        if asked and answered and answered[0].texts and not (loose and answered[0].names_things):
            yield "prompt", asked[0].name
            yield "response", answered[0].name
            return


def label_in(columns: Sequence[Column], without: set[str]) -> Column | None:
    known = [column for column in named(columns, LABELS) if column.kinds and column.name not in without]
    odd = {column.name for column in named(columns, CLIENTS)} | without
    others = [column for column in columns if column.names_things and column.name not in odd]
    return next(iter([*known, *others]), None)


def text_in(columns: Sequence[Column], without: set[str]) -> Column | None:
    """A column that is called like a text, or the one with the longest."""
    free = [column for column in columns if column.name not in without and column.texts]
    longest = sorted(free, key=lambda column: -column.length)
    return next(iter([*named(free, TEXTS), *longest]), None)


def classify(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    label = label_in(columns, {column.name for column in named(columns, TEXTS) if not column.names_things})
    text = text_in(columns, {label.name} if label else set())
    if label and text:
        yield "text", text.name
        yield "label", label.name


def image_classify(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    picture = next((column for column in columns if column.pictures), None)
    label = label_in(columns, {picture.name} if picture else set())
    if picture and label:
        yield "image", picture.name
        yield "label", label.name


def causal_lm(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    text = text_in(columns, set())
    if text:
        yield "text", text.name


FINDERS = {
    "preference": preference,
    "instruct": instruct,
    "image-classify": image_classify,
    "classify": classify,
    "causal-lm": causal_lm,
}


def client_of(columns: Sequence[Column], taken: set[str]) -> Column | None:
    """A column that is called like a client, with enough rows for each of its values."""
    for column in named([one for one in columns if one.name not in taken], CLIENTS):
        counts = Counter(map(str, column.values))
        if 2 <= len(counts) <= 100 and min(counts.values()) >= 5 and counts.keys() <= column.kinds:
            return column
    return None
