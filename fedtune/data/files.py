"""Sources that are files: JSON lines, CSV, Parquet, plain text, plays.

`path` is a file, a list of files, a pattern such as "data/*.jsonl", or a folder. Of a folder, all files of the source are read in the order
of their names; names that tell a split are respected (splits.py). A folder without such files but with subfolders is read with a column
`folder`, the subfolder's name: by = "column", column = "folder" makes each of them a client.
"""

from __future__ import annotations

import csv as csv_module
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import DataSettings
from fedtune.data.splits import Split, assign, is_hidden, split_of
from fedtune.data.text_files import read_bytes, read_text
from fedtune.errors import FedtuneError

TURN = re.compile(r"^([A-Z][^\n:]{1,40}):\n(.*)$", re.S)  # "First Citizen:\nSpeak, speak."
FOLDER = "folder"  # the column that says from which subfolder a row comes
RowsOf = Callable[[Path, DataSettings], Rows]


def existing(data: DataSettings) -> Path:
    """data.path, a single file or folder, as it stands on the disk. Raises D201."""
    path = Path(data.path if isinstance(data.path, str) else "").expanduser()
    if not data.path or not path.exists():
        raise missing(data, str(data.path))
    return path


def missing(data: DataSettings, path: str) -> FedtuneError:
    found = f"no '{path}' for data.source = '{data.source}'"
    return FedtuneError("D201", found, "a file or folder", "correct data.path (it starts in the working directory)")


def jsonl(data: DataSettings) -> Table:
    """One JSON object a line (blank lines are no rows), or one array of objects."""
    return read(data, (".jsonl", ".ndjson", ".json"), jsonl_rows)


def csv(data: DataSettings) -> Table:
    """Values with a heading, separated by commas, semicolons or tabs as the heading is; every cell is a text."""
    return read(data, (".csv", ".tsv"), csv_rows)


def parquet(data: DataSettings) -> Table:
    """Apache Parquet; images as `datasets` writes them ({bytes, path})."""
    return read(data, (".parquet",), parquet_rows)


def text(data: DataSettings) -> Table:
    """One row a paragraph (blank lines separate them), with columns text and file: by = "column", column = "file" makes each file a client."""
    return read(data, (".txt",), text_rows)


def plays(data: DataSettings) -> Table:
    """One row a turn: columns text (heading, lines and the blank line after them) and speaker. What has no heading is counted and left out."""
    path = existing(data)
    blocks = [block.strip() for block in read_text(path, data.encoding).split("\n\n") if block.strip()]
    turns = [(match[1], block) for block in blocks if (match := TURN.match(block))]
    if not turns:
        raise FedtuneError("D202", f"no turns in '{path}'", "paragraphs that start with 'NAME:' on a line of its own", "correct data.path or data.source")
    dropped = {"paragraphs without a speaker's heading": len(blocks) - len(turns)} if len(blocks) > len(turns) else {}
    return Table([{"text": block + "\n\n", "speaker": speaker} for speaker, block in turns], str(path), dropped=dropped)


def read(data: DataSettings, suffixes: Sequence[str], rows_of: RowsOf) -> Table:
    """All rows of a file, a list, a pattern or a folder. Raises D201 and D202."""
    given = [data.path] if isinstance(data.path, str) else list(data.path)
    where, base = Path(given[0]).expanduser() if given else Path(), ", ".join(given)
    if len(given) == 1 and where.is_dir():
        return read_folder(data, where, suffixes, rows_of)
    files = [path for one in given for path in matching(data, one)]
    rows = [row for path in files for row in rows_of(path, data)]
    if not rows:
        raise FedtuneError("D202", f"no rows in '{base}'", "at least one", "correct data.path")
    return Table(rows, base, folder=files[0].parent)


def matching(data: DataSettings, path: str) -> list[Path]:
    """The file of that name, or the files that a pattern means, in the order of their names. Raises D201."""
    file = Path(path).expanduser()
    if file.exists():
        return [file]
    found = sorted(file.parent.glob(file.name)) if any(sign in file.name for sign in "*?[") and file.parent.is_dir() else []
    kept = [one for one in found if one.is_file() and not is_hidden(one)]
    if not kept:
        raise missing(data, path)
    return kept


def read_folder(data: DataSettings, folder: Path, suffixes: Sequence[str], rows_of: RowsOf) -> Table:
    """A folder's files, or those of its subfolders with the subfolder's name beside each row. Hidden files are no data."""
    seen = sorted(folder.iterdir())
    visible = [path for path in seen if not is_hidden(path)]
    files, subfolders = of_source(visible, suffixes), [path for path in visible if path.is_dir()]
    dropped = {"hidden files and folders": len(seen) - len(visible)} if len(seen) > len(visible) else {}
    notes: list[str] = []
    parts: list[tuple[Path, Split, str]] = []
    if files:
        splits, notes = assign(files, folder)
        parts = [(path, split, "") for path, split in splits.items()]
        if ignored := [sub.name for sub in subfolders if of_source(sub.iterdir(), suffixes)]:
            notes.append(f"{len(ignored)} subfolders of {folder} with files of their own are not read ({', '.join(ignored[:3])}), since it holds files itself")
    elif subfolders and all(split_of(sub.name) for sub in subfolders):
        splits, notes = assign(subfolders, folder)
        parts = [(path, split, "") for sub, split in splits.items() for path in of_source(sub.iterdir(), suffixes)]
    else:
        for sub in subfolders:
            splits, said = assign(of_source(sub.iterdir(), suffixes), sub)
            notes += said
            parts += [(path, split, sub.name) for path, split in splits.items()]
    if not parts:
        raise FedtuneError(
            "D202", f"no *{suffixes[0]} files in '{folder}'", f"at least one file for data.source = '{data.source}'", "correct data.path or data.source"
        )
    rows: dict[Split, Rows] = {"train": [], "validation": [], "test": []}
    for path, split, name in parts:
        made = rows_of(path, data)
        rows[split] += [{FOLDER: name, **row} for row in made] if name else made
    if not rows["train"]:
        raise FedtuneError("D202", f"no rows in '{folder}'", "at least one", "correct data.path")
    if rows["validation"]:
        dropped["a validation split, which is neither trained nor tested on"] = len(rows["validation"])
    tested = any(split == "test" for _, split, _ in parts)
    return Table(rows["train"], str(folder), rows["test"] if tested else None, dropped, folder, tuple(notes))


def of_source(paths: object, suffixes: Sequence[str]) -> list[Path]:
    """Visible files with one of the suffixes, also compressed, by name. A .json counts only where there is nothing else."""
    plain = [path for path in sorted(paths) if path.is_file() and not is_hidden(path)]  # type: ignore[call-overload]
    ends = {suffix: [path for path in plain if path.name.lower().endswith((suffix, suffix + ".gz"))] for suffix in suffixes}
    found = [path for suffix, some in ends.items() if suffix != ".json" for path in some]
    return sorted(found or ends.get(".json", []))


def jsonl_rows(path: Path, data: DataSettings) -> Rows:
    text = read_text(path, data.encoding)
    if text.lstrip().startswith("["):
        try:
            made = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FedtuneError("D203", f"'{path}' ({error})", "an array of JSON objects", "correct the file") from error
        numbered = list(enumerate(made if isinstance(made, list) else [made], 1))
        return [checked(row, f"entry {number} of '{path}'", "a JSON object in every entry") for number, row in numbered]
    rows: Rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FedtuneError("D203", f"line {number} of '{path}' ({error})", "a JSON object on every line", "correct or remove the line") from error
            rows.append(checked(row, f"line {number} of '{path}'", "a JSON object on every line"))
    return rows


def checked(row: object, at: str, expected: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise FedtuneError("D203", f"{type(row).__name__} in {at}", expected, "correct or remove it")
    return row


def csv_rows(path: Path, data: DataSettings) -> Rows:
    rows: Rows = []
    text = read_text(path, data.encoding)
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=lambda sign: (heading.count(sign), sign == ","))
    usual = csv_module.field_size_limit(sys.maxsize)  # 131,072 characters, less than a long document; the limit is the process's, so it is put back
    try:
        reader = csv_module.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        for row in reader:
            if None in row or None in row.values():
                found = f"line {reader.line_num} of '{path}' with too many or too few fields"
                raise FedtuneError("D203", found, f"{len(reader.fieldnames or ())} fields as in the heading", "correct the line")
            rows.append(dict(row))
    except csv_module.Error as error:
        raise FedtuneError("D203", f"'{path}' after row {len(rows)} ({error})", "values separated by one sign", "correct the file") from error
    finally:
        csv_module.field_size_limit(usual)
    return rows


def parquet_rows(path: Path, data: DataSettings) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: Rows = pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(path))).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FedtuneError(
            "D203", f"'{path}', which is not readable as Parquet ({str(error)[:120]})", "a Parquet file", "correct data.path or data.source"
        ) from error
    return rows


def text_rows(path: Path, data: DataSettings) -> Rows:
    paragraphs = re.split(r"\n\s*\n", read_text(path, data.encoding))
    return [{"text": paragraph.strip("\n"), "file": path.name} for paragraph in paragraphs if paragraph.strip()]
