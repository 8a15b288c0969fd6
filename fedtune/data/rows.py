"""From what a source gives to rows of one shape per task, checked one by one.

    causal-lm        {"text": str}
    instruct         {"messages": [{"role", "content", ...}, ...], "tools": [...] if any} or {"prompt": str,
                     "response": str}
    preference       {"prompt", "chosen", "rejected"}, all str or all lists of messages, "tools" if any
    classify         {"text": str, "label": str}
    image-classify   {"image": path or uint8 array (height, width, channels), "label": str}

and "group": str where data.group names a column.

Nothing is cast but labels and client names: whole numbers become their digits and truth values true or false,
because files keep
classes as any of them.
Rows are counted from 1 in messages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedtune.data import chats, pairs
from fedtune.data.settings import Source
from fedtune.errors import FedtuneError
from fedtune.images import to_eight_bits

Rows = list[dict[str, Any]]
BLANK = "an empty text, response or label"
UNDECIDED = "an empty response, or two that are the same"  # of pairs


@dataclass(frozen=True)
class Table:
    """What a source gives: rows with the columns that they came with.

    test     the source's own test set, None if it has none
    dropped  reason -> rows that the source left out
    folder   where relative paths in an image column start
    notes    what was decided about files and should be said
    """

    rows: Rows
    where: str
    test: Rows | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clean:
    """Rows in the task's shape, beside each the value of the column that makes clients ("" if none), and how
    many were blank."""

    rows: Rows
    keys: list[str]
    blank: int


def why_blank(data: Source) -> str:
    """What blank rows lack."""
    return UNDECIDED if data.task == "preference" else BLANK


def clean(data: Source, rows: Rows, where: str, folder: Path | None = None, column: str = "") -> Clean:
    """Raises D203 (a cell that cannot be used), D204 (no such column), D206 (a label outside data.labels)."""
    made: Rows = []
    keys: list[str] = []
    for number, row in enumerate(rows, 1):
        at = f"row {number} of {where}"
        shaped = shape(data, row, at, folder)
        if shaped is None:
            continue
        if data.group:
            shaped["group"] = name_of(row, data.group, at, "data.group")
        made.append(shaped)
        keys.append(name_of(row, column, at, "partition.column") if column else shaped.get("label", ""))
    return Clean(made, keys, len(rows) - len(made))


def shape(data: Source, row: Mapping[str, Any], at: str, folder: Path | None) -> dict[str, Any] | None:
    """One row in the task's shape; None if it has no text, or nothing where its label should be."""
    if data.task in ("classify", "image-classify") and data.label in row and row[data.label] is None:
        return None
    if data.task == "image-classify":
        return {
            "image": picture(cell(row, data.image, at, "data.image"), data.image, at, folder),
            "label": label_of(data, row, at),
        }
    if data.task == "instruct" and data.messages:
        return chat(row, data.messages, at)
    if data.task == "instruct":
        prompt, response = prompt_of(data, row, at), text_of(row, data.response, at, "data.response")
        return {"prompt": prompt, "response": response} if response.strip() else None
    if data.task == "preference":
        return pair(data, row, at)
    text = text_of(row, data.text, at, "data.text")
    if not text.strip():
        return None
    return {"text": text, "label": label_of(data, row, at)} if data.task == "classify" else {"text": text}


def cell(row: Mapping[str, Any], column: str, at: str, setting: str) -> Any:
    """Raises D204 (no such column) and D203 (nothing in it)."""
    if column not in row:
        raise FedtuneError(
            "D204",
            f"no column '{column}' in {at}",
            f"one of its columns: {', '.join(sorted(map(str, row)))}",
            f"correct {setting}",
        )
    if row[column] is None:
        unreadable(f"nothing in column '{column}' of {at}", "a value in every row")
    return row[column]


def text_of(row: Mapping[str, Any], column: str, at: str, setting: str) -> str:
    """A text; nothing in the cell is an empty one, which is left out and counted. Raises D203 and D204."""
    value = "" if column in row and row[column] is None else cell(row, column, at, setting)
    if not isinstance(value, str):
        unreadable(f"{kind(value)} in column '{column}' of {at}", "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        unreadable(
            f"half a character (a lone surrogate) in column '{column}' of {at}",
            "text that can be written as UTF-8",
        )
    return value


def name_of(row: Mapping[str, Any], column: str, at: str, setting: str) -> str:
    """A label or a client's name: a text that is not empty, true or false, or a whole number (1.0 as well),
    which becomes its digits."""
    value = cell(row, column, at, setting)
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (float, np.floating, Decimal)) and value == value and value == int(value):
        value = int(value)
    if not isinstance(value, (str, int, np.integer)) or value == "":
        unreadable(f"{kind(value)} in column '{column}' of {at}", "a name or a whole number")
    return str(value)


def label_of(data: Source, row: Mapping[str, Any], at: str) -> str:
    label = name_of(row, data.label, at, "data.label")
    if data.labels and label not in data.labels:
        known = ", ".join(data.labels[:8]) + (" ..." if len(data.labels) > 8 else "")
        raise FedtuneError(
            "D206",
            f"the label '{label}' in {at}",
            f"one of {known}",
            "add it to data.labels or correct the row",
        )
    return label


def chat(row: Mapping[str, Any], column: str, at: str) -> dict[str, Any] | None:
    """A conversation in one form, whatever form it came in; None if the assistant says nothing in it."""
    messages = chats.messages(cell(row, column, at, "data.messages"), f"column '{column}' of {at}")
    tools = chats.tools(row.get("tools"), f"column 'tools' of {at}")
    return None if messages is None else {"messages": messages} | ({"tools": tools} if tools else {})


def pair(data: Source, row: Mapping[str, Any], at: str) -> dict[str, Any] | None:
    """A prompt with two responses; None where one of them is empty, or both are the same. Raises D203 and
    D204."""
    if data.prompt and data.prompt not in row and "{" not in data.template:
        cell(row, data.prompt, at, 'data.prompt, or set it to "" where both responses begin with it')
    if pairs.is_talk(cell(row, data.chosen, at, "data.chosen")):
        prompt = cell(row, data.prompt, at, "data.prompt") if data.prompt else None
        rejected = cell(row, data.rejected, at, "data.rejected")
        found = pairs.talks(prompt, row[data.chosen], rejected, at)
        tools = chats.tools(row.get("tools"), f"column 'tools' of {at}")
        made = None if found is None else dict(zip(("prompt", "chosen", "rejected"), found, strict=True))
        return made if made is None or not tools else made | {"tools": tools}
    chosen = text_of(row, data.chosen, at, "data.chosen")
    rejected = text_of(row, data.rejected, at, "data.rejected")
    if data.prompt:
        prompt = prompt_of(data, row, at)
    else:
        begins = pairs.shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:begins], chosen[begins:], rejected[begins:]
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompt_of(data: Source, row: Mapping[str, Any], at: str) -> str:
    """The prompt's column; where data.template is a text, that text with the row's columns in it (nothing
    where one has no value)."""
    if "{" not in data.template:
        return text_of(row, data.prompt, at, "data.prompt")
    before = data.template.removesuffix("{response}")

    def column(found: re.Match[str]) -> str:
        name = data.prompt if found[1] == "prompt" else found[1]
        return (
            ""
            if name != data.prompt and name in row and row[name] is None
            else text_of(row, name, at, "data.template")
        )

    return re.sub(r"\{([^{}]+)\}", column, before)


def picture(value: Any, column: str, at: str, folder: Path | None) -> str | np.ndarray:
    """A path stays a path (opened when encoded); anything else becomes uint8 (height, width, channels).
    Raises D203."""
    from PIL import Image

    if isinstance(value, str):
        return value if folder is None else str(folder / value)
    if isinstance(value, Mapping) and value.get("bytes") is not None:  # as `datasets` keeps images in Parquet
        value = value["bytes"]
    if isinstance(value, bytes):
        try:
            value = Image.open(io.BytesIO(value))
            value.load()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            unreadable(
                f"an image in column '{column}' of {at} that Pillow cannot read",
                "an image file's bytes",
                error,
            )
    if isinstance(value, Image.Image):
        try:
            value = np.asarray(to_eight_bits(value))
        except ValueError as error:
            unreadable(f"an image in column '{column}' of {at} with {error}", "8 bits a channel", error)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (2, 3):
        unreadable(
            f"{kind(value)} in column '{column}' of {at}",
            "a path, an image or a uint8 array (height, width, channels)",
        )
    return value if value.ndim == 3 else value[:, :, None]


def kind(value: Any) -> str:
    """What was found, in words short enough for a sentence."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def unreadable(found: str, expected: str, cause: Exception | None = None) -> NoReturn:
    raise FedtuneError("D203", found, expected, "correct or remove the row") from cause
