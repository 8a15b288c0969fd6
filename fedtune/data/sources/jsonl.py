"""JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import TextFileSource
from fedtune.data.sources.files import read
from fedtune.data.text_files import read_text
from fedtune.errors import FedtuneError


class Jsonl(TextFileSource):
    """source = "jsonl": one JSON object a line (blank lines are no rows), or one array of objects."""

    source: Literal["jsonl"] = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    def table(self) -> Table:
        return read(self, self.rows_of)

    def rows_of(self, path: Path) -> Rows:
        text = read_text(path, self.encoding)
        if text.lstrip().startswith("["):
            try:
                made = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise FedtuneError(
                    "D203", f"'{path}' ({error})", "an array of JSON objects", "correct the file"
                ) from error
            numbered = list(enumerate(made if isinstance(made, list) else [made], 1))
            return [
                checked(row, f"entry {number} of '{path}'", "a JSON object in every entry")
                for number, row in numbered
            ]
        rows: Rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise FedtuneError(
                        "D203",
                        f"line {number} of '{path}' ({error})",
                        "a JSON object on every line",
                        "correct or remove the line",
                    ) from error
                rows.append(checked(row, f"line {number} of '{path}'", "a JSON object on every line"))
        return rows


def checked(row: object, at: str, expected: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise FedtuneError("D203", f"{type(row).__name__} in {at}", expected, "correct or remove it")
    return row
