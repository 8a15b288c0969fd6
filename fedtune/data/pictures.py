"""Sources of images: a folder with one subfolder per class, and scikit-learn's digits."""

from __future__ import annotations

import numpy as np

from fedtune.data.files import existing
from fedtune.data.rows import Rows, Table
from fedtune.data.settings import DataSettings
from fedtune.errors import FedtuneError


def images(data: DataSettings) -> Table:
    """The class is the subfolder's name; images are opened when they are encoded. Raises D201 and D202."""
    from PIL import Image

    folder = existing(data)
    if not folder.is_dir():
        raise FedtuneError("D201", f"the file '{folder}'", "a folder with one subfolder per class", "correct data.path")
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    rows: Rows = []
    others = 0
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = sorted(p for p in sub.iterdir())
        found = [p for p in files if p.is_file() and p.suffix.lower() in suffixes]
        if not found:
            raise FedtuneError(
                "D202", f"no images in '{sub}'", "one subfolder per class, with its images directly in it", "fill or remove the subfolder, or correct data.path"
            )
        others += len(files) - len(found)
        rows += [{data.image: str(p.absolute()), data.label: sub.name} for p in found]
    others += sum(1 for p in folder.iterdir() if not p.is_dir())
    if not rows:
        raise FedtuneError("D202", f"no subfolders in '{folder}'", "one subfolder per class", "correct data.path")
    return Table(rows, str(folder), dropped={"files and folders that are no images": others} if others else {})


def digits(data: DataSettings) -> Table:
    """1,797 images of 8 x 8 pixels, 16 shades of grey spread over 0..255 (Alpaydin and Kaynak 1998). Raises D208."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise FedtuneError("D208", "no scikit-learn for data.source = 'digits'", "the package", "install it with: pip install scikit-learn") from None
    bunch = load_digits()
    shades = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    return Table([{data.image: image[:, :, None], data.label: str(label)} for image, label in zip(shades, bunch.target, strict=True)], "scikit-learn's digits")
