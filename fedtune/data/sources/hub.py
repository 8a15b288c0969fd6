"""A data set of the Hugging Face hub, or a local folder that `datasets` can load or has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import PathSource
from fedtune.errors import FedtuneError
from fedtune.extras import require


class Hub(PathSource):
    """source = "hub": a data set's name as path, or a folder that `datasets` can load or has saved."""

    source: Literal["hub"] = "hub"
    split: str = "train"
    """Which split to load."""

    def located(self, place: Path) -> Self:
        return self  # a data set's name, or a folder that is meant as it stands

    def table(self) -> Table:
        """The split `data.split`; classes kept as numbers with names become their names. Raises D201,
        D202 and D208."""
        datasets = require("datasets", "hub", "data.source = 'hub'", "D208")
        path = str(self.path)
        if path.startswith("~"):
            path = str(Path(path).expanduser())
        try:
            if (Path(path) / "state.json").is_file() or (
                Path(path) / "dataset_dict.json"
            ).is_file():  # written by save_to_disk
                loaded = datasets.load_from_disk(path)
                found = loaded if isinstance(loaded, datasets.Dataset) else loaded[self.split]
            else:
                found = datasets.load_dataset(path, split=self.split)
        except (
            Exception
        ) as error:  # loaders, file formats and the network raise what they like; all of it means: no data
            said = " ".join(str(error).split())[:160]
            raise FedtuneError(
                "D201",
                f"no split '{self.split}' of '{self.path}' ({type(error).__name__}: {said})",
                "a data set that can be loaded",
                "correct data.path and data.split, or run once with a network",
            ) from error
        names = {
            column: feature.names
            for column, feature in found.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        rows: Rows = [dict(row) for row in found]
        for row in rows:
            for column, classes in names.items():
                if row[column] is not None and row[column] >= 0:  # -1 marks a hidden label
                    row[column] = classes[row[column]]
        if not rows:
            raise FedtuneError(
                "D202",
                f"no rows in split '{self.split}' of '{self.path}'",
                "at least one",
                "correct data.split",
            )
        return Table(rows, f"{self.path} ({self.split})")
