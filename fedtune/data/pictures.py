"""Sources of images: a folder with one subfolder per class, and scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedtune.data.files import FOLDER, existing
from fedtune.data.rows import Rows, Table
from fedtune.data.settings import DataSettings
from fedtune.data.splits import Split, assign, is_hidden, split_of
from fedtune.errors import FedtuneError


def images(data: DataSettings) -> Table:
    """The class is the subfolder's name; images are opened when they are encoded. Raises D201 and D202.

    train/CLASS and test/CLASS are respected as splits; SITE/CLASS gives a column `folder`, by which each site can be a client.
    """
    folder = existing(data)
    if not folder.is_dir():
        raise FedtuneError("D201", f"the file '{folder}'", "a folder with one subfolder per class", "correct data.path")
    seen = sorted(folder.iterdir())
    subfolders = [path for path in seen if path.is_dir() and not is_hidden(path)]
    others = len(seen) - len(subfolders)
    if not subfolders:
        raise FedtuneError("D202", f"no subfolders in '{folder}'", "one subfolder per class", "correct data.path")
    rows: dict[Split, Rows] = {"train": [], "validation": [], "test": []}
    notes: list[str] = []
    nested = all(any(inner.is_dir() and not is_hidden(inner) for inner in sub.iterdir()) for sub in subfolders)
    if nested and all(split_of(sub.name) for sub in subfolders):
        splits, notes = assign(subfolders, folder)
        for sub, split in splits.items():
            made, more = classes_in(data, sub)
            rows[split] += made
            others += more
    elif nested:
        for sub in subfolders:
            made, more = classes_in(data, sub)
            rows["train"] += [{FOLDER: sub.name, **row} for row in made]
            others += more
    else:
        rows["train"], more = classes_in(data, folder)
        others = more
    dropped = {"files and folders that are no images": others} if others else {}
    if rows["validation"]:
        dropped["a validation split, which is neither trained nor tested on"] = len(rows["validation"])
    return Table(rows["train"], str(folder), rows["test"] or None, dropped, notes=tuple(notes))


def classes_in(data: DataSettings, folder: Path) -> tuple[Rows, int]:
    """The images of a folder's subfolders, one a class, and how many files and folders are none."""
    from PIL import Image

    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    rows: Rows = []
    seen = sorted(folder.iterdir())
    subfolders = [path for path in seen if path.is_dir() and not is_hidden(path)]
    others = len(seen) - len(subfolders)
    for sub in subfolders:
        files = sorted(sub.iterdir())
        found = [path for path in files if path.is_file() and not is_hidden(path) and path.suffix.lower() in suffixes]
        if not found:
            expected = "one subfolder per class, with its images directly in it"
            raise FedtuneError("D202", f"no images in '{sub}'", expected, "fill or remove the subfolder, or correct data.path")
        others += len(files) - len(found)
        rows += [{data.image: str(path.absolute()), data.label: sub.name} for path in found]
    return rows, others


def digits(data: DataSettings) -> Table:
    """1,797 images of 8 x 8 pixels, 16 shades of grey spread over 0..255 (Alpaydin and Kaynak 1998). Raises D208."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise FedtuneError("D208", "no scikit-learn for data.source = 'digits'", "the package", "install it with: pip install scikit-learn") from None
    bunch = load_digits()
    shades = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    return Table([{data.image: image[:, :, None], data.label: str(label)} for image, label in zip(shades, bunch.target, strict=True)], "scikit-learn's digits")
