"""Images: a folder with one subfolder per class."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import PathSource
from fedtune.data.sources.files import FOLDER, existing
from fedtune.data.splits import Split, assign, is_hidden, split_of
from fedtune.errors import FedtuneError


class Images(PathSource):
    """source = "images": one subfolder per class; columns image and label."""

    source: Literal["images"] = "images"
    tasks: ClassVar[frozenset[str]] = frozenset({"image-classify"})

    def table(self) -> Table:
        """The class is the subfolder's name; images are opened when they are encoded. Raises D201 and D202.

        train/CLASS and test/CLASS are respected as splits; SITE/CLASS gives a column `folder`, by which each
        site can be a client.
        """
        folder = existing(self)
        if not folder.is_dir():
            raise FedtuneError(
                "D201", f"the file '{folder}'", "a folder with one subfolder per class", "correct data.path"
            )
        seen = sorted(folder.iterdir())
        subfolders = [path for path in seen if path.is_dir() and not is_hidden(path)]
        others = len(seen) - len(subfolders)
        if not subfolders:
            raise FedtuneError(
                "D202", f"no subfolders in '{folder}'", "one subfolder per class", "correct data.path"
            )
        rows: dict[Split, Rows] = {"train": [], "validation": [], "test": []}
        notes: list[str] = []
        nested = all(
            any(inner.is_dir() and not is_hidden(inner) for inner in sub.iterdir()) for sub in subfolders
        )
        if nested and all(split_of(sub.name) for sub in subfolders):
            splits, notes = assign(subfolders, folder)
            for sub, split in splits.items():
                made, more = classes_in(self, sub)
                rows[split] += made
                others += more
        elif nested:
            for sub in subfolders:
                made, more = classes_in(self, sub)
                rows["train"] += [{FOLDER: sub.name, **row} for row in made]
                others += more
        else:
            rows["train"], more = classes_in(self, folder)
            others = more
        dropped = {"files and folders that are no images": others} if others else {}
        if rows["validation"]:
            dropped["a validation split, which is neither trained nor tested on"] = len(rows["validation"])
        return Table(rows["train"], str(folder), rows["test"] or None, dropped, notes=tuple(notes))


def classes_in(data: Images, folder: Path) -> tuple[Rows, int]:
    """The images of a folder's subfolders, one a class, and how many files and folders are none."""
    from PIL import Image

    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    rows: Rows = []
    seen = sorted(folder.iterdir())
    subfolders = [path for path in seen if path.is_dir() and not is_hidden(path)]
    others = len(seen) - len(subfolders)
    for sub in subfolders:
        files = sorted(sub.iterdir())
        found = [
            path
            for path in files
            if path.is_file() and not is_hidden(path) and path.suffix.lower() in suffixes
        ]
        if not found:
            expected = "one subfolder per class, with its images directly in it"
            raise FedtuneError(
                "D202",
                f"no images in '{sub}'",
                expected,
                "fill or remove the subfolder, or correct data.path",
            )
        others += len(files) - len(found)
        rows += [{data.image: str(path.absolute()), data.label: sub.name} for path in found]
    return rows, others
