"""Plain text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import TextFileSource
from fedtune.data.sources.files import read
from fedtune.data.text_files import read_text


class Text(TextFileSource):
    """source = "text": one row a paragraph (blank lines separate them), with columns text and file: by =
    "column", column = "file" makes each file a client."""

    source: Literal["text"] = "text"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    def table(self) -> Table:
        return read(self, self.rows_of)

    def rows_of(self, path: Path) -> Rows:
        paragraphs = re.split(r"\n\s*\n", read_text(path, self.encoding))
        return [
            {"text": paragraph.strip("\n"), "file": path.name}
            for paragraph in paragraphs
            if paragraph.strip()
        ]
