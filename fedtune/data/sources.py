"""Every source by its name in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from fedtune.data import files
from fedtune.data.clinc150 import clinc150
from fedtune.data.docstrings import docstrings
from fedtune.data.hub import hub
from fedtune.data.pictures import digits, images
from fedtune.data.rows import Table
from fedtune.data.settings import DataSettings, Source

SOURCES: dict[Source, Callable[[DataSettings], Table]] = {
    "docstrings": docstrings,
    "jsonl": files.jsonl,
    "csv": files.csv,
    "parquet": files.parquet,
    "text": files.text,
    "plays": files.plays,
    "clinc150": clinc150,
    "images": images,
    "digits": digits,
    "hub": hub,
}
