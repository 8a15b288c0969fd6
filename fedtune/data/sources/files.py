"""Reading a path: a file, several, or a folder.

`path` is a file, a list of files, a pattern such as "data/*.jsonl", or a folder. Of a folder, all files of
the source are read in the order
of their names; names that tell a split are respected (splits.py). A folder without such files but with
subfolders is read with a column
`folder`, the subfolder's name: by = "column", column = "folder" makes each of them a client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import PathSource
from fedtune.data.splits import Split, assign, is_hidden, split_of
from fedtune.errors import FedtuneError

FOLDER = "folder"  # the column that says from which subfolder a row comes
RowsOf = Callable[[Path], Rows]


def existing(data: PathSource) -> Path:
    """data.path, a single file or folder, as it stands on the disk. Raises D201."""
    path = Path(data.path if isinstance(data.path, str) else "").expanduser()
    if not data.path or not path.exists():
        raise missing(data, str(data.path))
    return path


def missing(data: PathSource, path: str) -> FedtuneError:
    found = f"nothing at '{path}' for data.source = '{data.source}'"
    return FedtuneError(
        "D201", found, "a file or folder", "correct data.path (relative paths start in the working directory)"
    )


def read(data: PathSource, rows_of: RowsOf) -> Table:
    """All rows of a file, a list, a pattern or a folder. Raises D201 and D202."""
    given = [data.path] if isinstance(data.path, str) else list(data.path)
    where, base = Path(given[0]).expanduser() if given else Path(), ", ".join(given)
    if len(given) == 1 and where.is_dir():
        return read_folder(data, where, rows_of)
    files = [path for one in given for path in matching(data, one)]
    rows = [row for path in files for row in rows_of(path)]
    if not rows:
        raise FedtuneError("D202", f"no rows in '{base}'", "at least one", "correct data.path")
    return Table(rows, base, folder=files[0].parent)


def matching(data: PathSource, path: str) -> list[Path]:
    """The file of that name, or the files that a pattern means, in the order of their names. Raises D201."""
    file = Path(path).expanduser()
    if file.exists():
        return [file]
    found = (
        sorted(file.parent.glob(file.name))
        if any(sign in file.name for sign in "*?[") and file.parent.is_dir()
        else []
    )
    kept = [one for one in found if one.is_file() and not is_hidden(one)]
    if not kept:
        raise missing(data, path)
    return kept


def read_folder(data: PathSource, folder: Path, rows_of: RowsOf) -> Table:
    """A folder's files, or those of its subfolders with the subfolder's name beside each row. Hidden files
    are no data."""
    seen = sorted(folder.iterdir())
    visible = [path for path in seen if not is_hidden(path)]
    files, subfolders = of_source(visible, data.suffixes), [path for path in visible if path.is_dir()]
    dropped = {"hidden files and folders": len(seen) - len(visible)} if len(seen) > len(visible) else {}
    notes: list[str] = []
    parts: list[tuple[Path, Split, str]] = []
    if files:
        splits, notes = assign(files, folder)
        parts = [(path, split, "") for path, split in splits.items()]
        if ignored := [sub.name for sub in subfolders if of_source(sub.iterdir(), data.suffixes)]:
            notes.append(
                f"{len(ignored)} subfolders of {folder} with files of their own are not read "
                f"({', '.join(ignored[:3])}), since it holds files itself"
            )
    elif subfolders and all(split_of(sub.name) for sub in subfolders):
        splits, notes = assign(subfolders, folder)
        parts = [
            (path, split, "")
            for sub, split in splits.items()
            for path in of_source(sub.iterdir(), data.suffixes)
        ]
    else:
        for sub in subfolders:
            splits, said = assign(of_source(sub.iterdir(), data.suffixes), sub)
            notes += said
            parts += [(path, split, sub.name) for path, split in splits.items()]
    if not parts:
        raise FedtuneError(
            "D202",
            f"no *{data.suffixes[0]} files in '{folder}'",
            f"at least one file for data.source = '{data.source}'",
            "correct data.path or data.source",
        )
    rows: dict[Split, Rows] = {"train": [], "validation": [], "test": []}
    for path, split, name in parts:
        made = rows_of(path)
        rows[split] += [{FOLDER: name, **row} for row in made] if name else made
    if not rows["train"]:
        raise FedtuneError("D202", f"no rows in '{folder}'", "at least one", "correct data.path")
    if rows["validation"]:
        dropped["a validation split, which is neither trained nor tested on"] = len(rows["validation"])
    tested = any(split == "test" for _, split, _ in parts)
    return Table(rows["train"], str(folder), rows["test"] if tested else None, dropped, folder, tuple(notes))


def of_source(paths: object, suffixes: Sequence[str]) -> list[Path]:
    """Visible files with one of the suffixes, also compressed, by name. A .json counts only where there is
    nothing else."""
    plain = [path for path in sorted(paths) if path.is_file() and not is_hidden(path)]  # type: ignore[call-overload]
    ends = {
        suffix: [path for path in plain if path.name.lower().endswith((suffix, suffix + ".gz"))]
        for suffix in suffixes
    }
    found = [path for suffix, some in ends.items() if suffix != ".json" for path in some]
    return sorted(found or ends.get(".json", []))
