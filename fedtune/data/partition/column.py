"""Clients by a column. flwr-datasets' own partitioner draws a progress bar and keeps no order of size, so the
few lines are here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedtune.data.partition.base import Groups, Partition
from fedtune.errors import FedtuneError


class Column(Partition):
    """by = "column": one client per value of a column."""

    by: Literal["column"] = "column"
    by_value: ClassVar[bool] = True
    help_: ClassVar[str] = "lower partition.clients, partition.min_rows or data.client_test_share"
    column: str = ""
    """The column that names the client."""
    clients: int = Field(8, ge=1)
    """Number of clients: the values with most characters (classes: most rows) are kept, and the rows of the
    others left out and counted.
    A recipe that does not say it takes all values."""
    all_values: bool = False
    """Every value becomes a client, whatever `clients` says."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if not self.column:
            yield (
                "partition.by = 'column' without partition.column",
                "the column that names the client",
                "set partition.column",
            )

    @property
    def key_column(self) -> str:
        return self.column

    @property
    def open_ended(self) -> bool:
        return self.all_values

    def values(self, sizes: Mapping[str, int]) -> list[str]:
        """Largest first, then by name. Raises D205."""
        ordered = sorted(sizes, key=lambda value: (-sizes[value], value))
        if self.all_values:
            return ordered
        if len(ordered) < self.clients:
            found = f"{len(ordered)} values in column '{self.column}' for {self.clients} clients"
            do = f"set partition.clients = {len(ordered)} or partition.all_values = true"
            raise FedtuneError("D205", found, "at least one value per client", do)
        return ordered[: self.clients]

    def groups(self, keys: Sequence[str], seed: int, kept: Sequence[str] = ()) -> Groups:
        rows: dict[str, list[int]] = {value: [] for value in kept}
        for row, key in enumerate(keys):
            rows[key].append(row)
        return list(rows.items())
