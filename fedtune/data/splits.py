"""Files and folders that a user has already split: their names say what trains, what is tested on, and what
is neither."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from fedtune.errors import FedtuneError

Split = Literal["train", "validation", "test"]
WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout"), "test"),
}
SHARD = re.compile(r"(\d+|of)")  # the numbers of train-00000-of-00002.parquet


def split_of(name: str) -> Split | None:
    """The split that a name without its suffix says it is: as its first or last word, numbers of shards
    aside.

    >>> [split_of(name) for name in ("train-00000-of-00002", "squad_test", "dev", "contest", "patients")]
    ['train', 'test', 'validation', None, None]
    """
    words = [word for word in re.split(r"[-_. ]+", name.lower()) if word and not SHARD.fullmatch(word)]
    return next((WORDS[word] for word in (words[:1] + words[-1:]) if word in WORDS), None)


def is_hidden(path: Path) -> bool:
    """What file managers, version control and notebooks leave behind: no data and no class."""
    return path.name.startswith(".") or path.name in ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini")


def stem(path: Path) -> str:
    """A file's name without its suffixes (rows.jsonl.gz: rows)."""
    return path.name.partition(".")[0]


def assign(paths: Iterable[Path], where: Path) -> tuple[dict[Path, Split], list[str]]:
    """Each path's split, and what should be said about it.

    With a test split, or without any, a validation split is left out; without a test split it is the test
    set. What no name tells trains.
    Raises D202 where nothing is left to train on, and for names of which only some tell a split.
    """
    told = {path: split_of(stem(path)) for path in paths}
    kinds = {split for split in told.values() if split}
    if kinds and None in told.values() and "train" in kinds:
        odd = next(path.name for path, split in told.items() if split is None)
        found = f"'{odd}' beside a training file in '{where}'"
        raise FedtuneError(
            "D202",
            found,
            "file names that all name a split (train, validation, test), or none that does",
            "rename or move it",
        )
    notes: list[str] = []
    splits: dict[Path, Split] = {path: split or "train" for path, split in told.items()}
    held = sorted(path.name for path, split in splits.items() if split == "validation")
    if held and "test" not in splits.values():
        splits = {path: "test" if split == "validation" else split for path, split in splits.items()}
        notes.append(f"{', '.join(held[:3])} is the test set: there is no test split in {where}")
    if splits and "train" not in splits.values():
        raise FedtuneError(
            "D202",
            f"nothing to train on in '{where}'",
            "a training file, or files without a split in their names",
            "add or rename one",
        )
    return splits, notes
