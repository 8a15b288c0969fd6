"""Sources that are files: JSON lines, CSV, Parquet, plain text, plays.

`path` is a file, or a folder whose files with the source's suffix are read in the order of their names; in a folder a file
named `test` (test.jsonl, say) is the source's own test set.
"""

from __future__ import annotations

import csv as csv_module
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import DataSettings
from fedtune.errors import FedtuneError

TURN = re.compile(r"^([A-Z][^\n:]{1,40}):\n(.*)$", re.S)  # "First Citizen:\nSpeak, speak."


def existing(data: DataSettings) -> Path:
    """data.path as it stands on the disk. Raises D201."""
    path = Path(data.path).expanduser()
    if not data.path or not path.exists():
        raise FedtuneError(
            "D201", f"no '{data.path}' for data.source = '{data.source}'", "a file or folder", "correct data.path (it starts in the working directory)"
        )
    return path


def jsonl(data: DataSettings) -> Table:
    """One JSON object a line; blank lines separate nothing and are no rows."""
    return read(data, ".jsonl", jsonl_rows)


def csv(data: DataSettings) -> Table:
    """Comma-separated values with a heading; every cell is a text."""
    return read(data, ".csv", csv_rows)


def parquet(data: DataSettings) -> Table:
    """Apache Parquet; images as `datasets` writes them ({bytes, path})."""
    return read(data, ".parquet", parquet_rows)


def text(data: DataSettings) -> Table:
    """One row a paragraph (blank lines separate them), with columns text and file: by = "column", column = "file" makes each file a client."""
    return read(data, ".txt", text_rows)


def plays(data: DataSettings) -> Table:
    """One row a turn: columns text (heading, lines and the blank line after them) and speaker. What has no heading is counted and left out."""
    path = existing(data)
    blocks = [block.strip() for block in decoded(path).split("\n\n") if block.strip()]
    turns = [(match[1], block) for block in blocks if (match := TURN.match(block))]
    if not turns:
        raise FedtuneError("D202", f"no turns in '{path}'", "paragraphs that start with 'NAME:' on a line of its own", "correct data.path or data.source")
    dropped = {"paragraphs without a speaker's heading": len(blocks) - len(turns)} if len(blocks) > len(turns) else {}
    return Table([{"text": block + "\n\n", "speaker": speaker} for speaker, block in turns], str(path), dropped=dropped)


def read(data: DataSettings, suffix: str, rows_of: Callable[[Path], Rows]) -> Table:
    """All rows of a file or folder. Raises D201 and D202."""
    path = existing(data)
    files = sorted(p for p in path.iterdir() if p.suffix == suffix and p.is_file()) if path.is_dir() else [path]
    if not files:
        raise FedtuneError(
            "D202", f"no *{suffix} files in '{path}'", f"at least one file for data.source = '{data.source}'", "correct data.path or data.source"
        )
    tests = [p for p in files if path.is_dir() and p.stem == "test"]
    rows = [row for p in files if p not in tests for row in rows_of(p)]
    test = [row for p in tests for row in rows_of(p)] if tests else None
    if not rows:
        raise FedtuneError("D202", f"no rows in '{path}'", "at least one", "correct data.path")
    return Table(rows, str(path), test, folder=path if path.is_dir() else path.parent)


def jsonl_rows(path: Path) -> Rows:
    rows: Rows = []
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
                raise FedtuneError("D203", f"line {number} of '{path}' ({error})", "a JSON object on every line", "correct or remove the line") from error
            if not isinstance(row, dict):
                raise FedtuneError("D203", f"{type(row).__name__} in line {number} of '{path}'", "a JSON object on every line", "correct or remove the line")
            rows.append(row)
    return rows


def csv_rows(path: Path) -> Rows:
    rows: Rows = []
    usual = csv_module.field_size_limit(sys.maxsize)  # 131,072 characters, less than a long document; the limit is the process's, so it is put back
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv_module.DictReader(handle, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise FedtuneError(
                        "D203",
                        f"line {reader.line_num} of '{path}' with too many or too few fields",
                        f"{len(reader.fieldnames or ())} fields as in the heading",
                        "correct the line",
                    )
                rows.append(dict(row))
    except (csv_module.Error, UnicodeDecodeError) as error:
        raise FedtuneError("D203", f"'{path}' after row {len(rows)} ({error})", "comma-separated values in UTF-8", "correct the file") from error
    finally:
        csv_module.field_size_limit(usual)
    return rows


def parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: Rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FedtuneError(
            "D203", f"'{path}', which is not readable as Parquet ({str(error)[:120]})", "a Parquet file", "correct data.path or data.source"
        ) from error
    return rows


def text_rows(path: Path) -> Rows:
    return [{"text": paragraph.strip("\n"), "file": path.name} for paragraph in re.split(r"\n\s*\n", decoded(path)) if paragraph.strip()]


def decoded(path: Path) -> str:
    """A text file in UTF-8, line ends as \\n. Raises D203."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FedtuneError("D203", f"'{path}', which is not UTF-8 at byte {error.start}", "a text file in UTF-8", "convert it") from error
    except IsADirectoryError as error:
        raise FedtuneError("D201", f"the folder '{path}'", "a file", "correct data.path") from error
