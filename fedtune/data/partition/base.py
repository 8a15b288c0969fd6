"""What every partition is: a table of settings that makes clients of one set of rows. Simulation only: a real
site has its own rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from fedtune.errors import FedtuneError
from fedtune.settings import Settings
from fedtune.types import LM_TASKS

Groups = list[tuple[str, list[int]]]  # a client's name and its row numbers, which rise


class Partition(Settings):
    """[partition]: how the rows of one source become clients.

    by_value  whether each client is a value of the key column
    help_     what to do about a client with too few rows
    """

    by: str
    by_value: ClassVar[bool] = False
    help_: ClassVar[str] = "lower partition.clients or use more data"
    clients: int = Field(8, ge=1)
    """Number of clients."""
    min_rows: int = Field(1, ge=1)
    """A client with fewer training rows is an error."""

    @property
    def key_column(self) -> str:
        """The column by which rows are told apart; empty: the label."""
        return ""

    @property
    def open_ended(self) -> bool:
        """Whether the data says how many clients there are."""
        return False

    def values(self, sizes: Mapping[str, int]) -> list[str]:
        """by_value: the values that become clients, in their order, from how much each has (characters or
        rows)."""
        return []

    def groups(self, keys: Sequence[str], seed: int, kept: Sequence[str] = ()) -> Groups:
        """Every client's row numbers: disjoint, rising, together all rows. `keys` has one entry a row; `kept`
        is what `values` said. Raises D205."""
        if len(keys) < self.clients:
            expected = "at least one row per client"
            raise FedtuneError(
                "D205",
                f"{len(keys)} rows for {self.clients} clients",
                expected,
                "lower partition.clients or use more data",
            )
        return [(f"client-{number}", sorted(rows)) for number, rows in enumerate(self.divide(keys, seed))]

    def divide(self, keys: Sequence[str], seed: int) -> list[list[int]]:
        """The row numbers of each client, in the order of their numbers."""
        raise NotImplementedError(f"'{self.by}' divides no rows")

    def too_few(self, name: str, rows: int) -> FedtuneError:
        """D205 for one client, with what would help."""
        return FedtuneError(
            "D205",
            f"{rows} training rows at client '{name}'",
            f"at least partition.min_rows = {self.min_rows}",
            self.help_,
        )


class KeyedPartition(Partition):
    """A partition that skews a label or a column."""

    column: str = ""
    """The column to skew, if not the label."""

    @property
    def key_column(self) -> str:
        return self.column

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if not self.column and recipe.data.task in LM_TASKS:
            yield (
                f"partition.by = '{self.by}' for a task without labels",
                "a column to skew",
                "set partition.column, or partition.by = 'iid'",
            )
