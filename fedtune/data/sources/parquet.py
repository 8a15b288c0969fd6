"""Apache Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import PathSource
from fedtune.data.sources.files import read
from fedtune.data.text_files import read_bytes
from fedtune.errors import FedtuneError
from fedtune.extras import require


class Parquet(PathSource):
    """source = "parquet": Apache Parquet; images as `datasets` writes them ({bytes, path})."""

    source: Literal["parquet"] = "parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def table(self) -> Table:
        return read(self, self.rows_of)

    def rows_of(self, path: Path) -> Rows:
        pyarrow = require("pyarrow", "parquet", "data.source = 'parquet'", "D208")
        require("pyarrow.parquet", "parquet", "data.source = 'parquet'", "D208")
        try:
            rows: Rows = pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(path))).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise FedtuneError(
                "D203",
                f"'{path}', which is not readable as Parquet ({str(error)[:120]})",
                "a Parquet file",
                "correct data.path or data.source",
            ) from error
        return rows
