"""How much data a site says it has: with its greeting, before any round, so that no answer can weigh more
than that. Bounds from above, read off the files."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.extras import require
from fedtune.methods import weights
from fedtune.runtime.site_scores import SCORE
from fedtune.types import TOKEN_TASKS

LINES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
PACKED = 1032  # bytes that one byte of a deflated file can become, at most
PIECE = 1 << 20
SPECIAL = 16  # tokens of a row that stand for no byte of it, at most: heads of turns, the end


def declared(*places: str) -> dict[str, int]:
    """Rows and bytes of files, folders or patterns together; nothing where there are none."""
    known = [counted for place in places if (counted := counts(place))]
    return {key: sum(one[key] for one in known) for key in ("rows", "bytes")} if known else {}


def counts(data: str) -> dict[str, int]:
    place = Path(data)
    files = (
        [place]
        if place.is_file()
        else sorted(path for path in place.rglob("*") if path.is_file())
        if place.is_dir()
        else []
    )
    if not data or not files:
        return {}
    stats = [path.stat() for path in files]
    sizes = [
        found.st_size * (PACKED if path.suffix == ".gz" else 1)
        for path, found in zip(files, stats, strict=True)
    ]
    rows = [
        rows_of(path, size, found.st_mtime_ns) for path, size, found in zip(files, sizes, stats, strict=True)
    ]
    return {"rows": sum(rows), "bytes": sum(sizes)}


@functools.lru_cache(1 << 16)  # a site greets more often than its files change
def rows_of(path: Path, size: int, changed: int) -> int:
    """At least as many as the file has: ends of lines where a row is one, otherwise a row a byte."""
    if path.suffix == ".parquet":
        require("pyarrow.parquet", "parquet", "a Parquet file", "D208")
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
    if path.suffix not in LINES:
        return size if path.suffix in (".json", ".gz") else 1  # an image
    with path.open("rb") as file:
        return 1 + sum(
            piece.count(b"\n") + piece.count(b"\r") for piece in iter(lambda: file.read(PIECE), b"")
        )


def heaviest(recipe: Recipe, report: Mapping[str, Any], verb: str) -> float:
    """What an answer of a site that declared this can weigh at most; nothing bounds one that declared nothing
    (demos)."""
    rows, size = report.get("rows"), report.get("bytes")
    if not (isinstance(rows, int) and isinstance(size, int) and rows > 0 and size > 0):
        return math.inf
    language = recipe.data.task in TOKEN_TASKS
    tokens = float(size + SPECIAL * rows)
    if verb == SCORE:
        return tokens if language else float(rows)
    if recipe.data.task == "image-classify":
        tokens = float(rows)  # an image counts as one
    tokens += rows * sum(one.longer for one in recipe.select)
    if stride := getattr(recipe.data, "stride", 0):
        tokens *= math.ceil(recipe.data.max_length / stride)  # blocks overlap
    examples = tokens if recipe.data.task == "causal-lm" else float(rows)
    return weights.heaviest(str(recipe.method.model_dump().get("weight", "rows")), examples, tokens)
