"""Comma-separated values."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import ClassVar, Literal

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import TextFileSource
from fedtune.data.sources.files import read
from fedtune.data.text_files import read_text
from fedtune.errors import FedtuneError


class Csv(TextFileSource):
    """source = "csv": values with a heading, separated by commas, semicolons or tabs as the heading is; every
    cell is a text."""

    source: Literal["csv"] = "csv"
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    def table(self) -> Table:
        return read(self, self.rows_of)

    def rows_of(self, path: Path) -> Rows:
        rows: Rows = []
        text = read_text(path, self.encoding)
        heading = text.partition("\n")[0]
        delimiter = max(",;\t", key=lambda sign: (heading.count(sign), sign == ","))
        usual = csv.field_size_limit(
            sys.maxsize
        )  # 131,072 characters, less than a long document; the limit is the process's, so it is put back
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
            for row in reader:
                if None in row or None in row.values():
                    found = f"line {reader.line_num} of '{path}' with too many or too few fields"
                    raise FedtuneError(
                        "D203",
                        found,
                        f"{len(reader.fieldnames or ())} fields as in the header",
                        "correct the line",
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise FedtuneError(
                "D203",
                f"'{path}' after row {len(rows)} ({error})",
                "values separated by commas, semicolons or tabs",
                "correct the file",
            ) from error
        finally:
            csv.field_size_limit(usual)
        return rows
