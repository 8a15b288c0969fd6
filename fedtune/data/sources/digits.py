"""scikit-learn's digits."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from fedtune.data.rows import Table
from fedtune.data.settings import Source
from fedtune.errors import FedtuneError


class Digits(Source):
    """source = "digits": built in, needs no file; columns image and label."""

    source: Literal["digits"] = "digits"
    tasks: ClassVar[frozenset[str]] = frozenset({"image-classify"})

    def table(self) -> Table:
        """1,797 images of 8 x 8 pixels, 16 shades of grey spread over 0..255 (Alpaydin and Kaynak 1998).
        Raises D208."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise FedtuneError(
                "D208",
                sentence="data.source = 'digits' needs scikit-learn, which is not installed",
                do="run: pip install scikit-learn",
            ) from None
        bunch = load_digits()
        shades = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
        return Table(
            [
                {self.image: image[:, :, None], self.label: str(label)}
                for image, label in zip(shades, bunch.target, strict=True)
            ],
            "scikit-learn's digits",
        )
