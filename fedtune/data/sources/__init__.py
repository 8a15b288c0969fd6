"""Sources of data, one file each: settings, flags and code. A source is registered by its place in
`DataSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fedtune.data.settings import Source
from fedtune.data.sources.clinc150 import Clinc150
from fedtune.data.sources.csv import Csv
from fedtune.data.sources.digits import Digits
from fedtune.data.sources.docstring_questions import DocstringQuestions
from fedtune.data.sources.docstrings import Docstrings
from fedtune.data.sources.facts import Facts
from fedtune.data.sources.hub import Hub
from fedtune.data.sources.images import Images
from fedtune.data.sources.jsonl import Jsonl
from fedtune.data.sources.parquet import Parquet
from fedtune.data.sources.plays import Plays
from fedtune.data.sources.text import Text
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

DataSettings = Annotated[
    Docstrings
    | Jsonl
    | Csv
    | Parquet
    | Text
    | Plays
    | Clinc150
    | Images
    | Digits
    | Hub
    | DocstringQuestions
    | Facts,
    Field(discriminator="source"),
]
if not TYPE_CHECKING:
    DataSettings = extended(DataSettings, "source", "sources", Source)
SOURCES: dict[str, type[Source]] = classes_by_tag(DataSettings, "source")


def data_at(data: Source, path: str, **changes: Any) -> Source:
    """What `data` says about columns and rows, read from another path: by the source that the file's suffix
    tells, if that is not its own."""
    plain = path.lower().removesuffix(".gz")
    told = next((cls for cls in SOURCES.values() if plain.endswith(cls.suffixes or "\n")), type(data))
    cls = type(data) if plain.endswith(data.suffixes or "\n") else told
    known = {key: value for key, value in data if key in cls.model_fields and key != "source"}
    return cls(**known | {"path": path} | changes)


__all__ = ["SOURCES", "DataSettings", "Docstrings", "Source", "data_at"]
