"""One set of rows -> clients. Each partition gives lists of row numbers that are disjoint, together are all rows, and rise.

IID, Dirichlet and size skew are flwr-datasets' partitioners. Two of its partitioners do not fit and are a few lines here:
ShardPartitioner loses up to one row per shard, and NaturalIdPartitioner draws a progress bar and keeps no order of size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.settings import PartitionSettings
from fedtune.errors import FedtuneError
from fedtune.rng import seed_of, stream

Groups = list[list[int]]


def partition_rows(settings: PartitionSettings, keys: Sequence[str], seed: int) -> list[tuple[str, list[int]]]:
    """(client's name, its row numbers) for all partitions but by = "column". `keys` is what is skewed: a label for each row. Raises D205."""
    if len(keys) < settings.clients:
        raise FedtuneError(
            "D205", f"{len(keys)} rows for {settings.clients} clients", "at least one row per client", "lower partition.clients or use more data"
        )
    makers = {"iid": iid, "dirichlet": dirichlet, "shards": shards, "size": size}
    groups = makers[settings.by](settings, keys, seed)
    return [(f"client-{number}", sorted(group)) for number, group in enumerate(groups)]


def iid(settings: PartitionSettings, keys: Sequence[str], seed: int) -> Groups:
    """Equal shares (to one row) of the shuffled rows."""
    from flwr_datasets.partitioner import IidPartitioner

    return divided(IidPartitioner(settings.clients), stream("partition", seed).permutation(len(keys)), settings.clients)


def dirichlet(settings: PartitionSettings, keys: Sequence[str], seed: int) -> Groups:
    """For each label, shares drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335). Drawn once: a client without rows is told, not redrawn."""
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        settings.clients, "key", settings.alpha, min_partition_size=0, self_balancing=False, shuffle=False, seed=seed_of("partition", seed)
    )
    return divided(partitioner, np.arange(len(keys)), settings.clients, keys)


def size(settings: PartitionSettings, keys: Sequence[str], seed: int) -> Groups:
    """The shuffled rows in shares of 1 : 2 : ... : clients, so that the last client has most."""
    from flwr_datasets.partitioner import LinearPartitioner

    try:
        return divided(LinearPartitioner(settings.clients), stream("partition", seed).permutation(len(keys)), settings.clients)
    except ValueError:  # the first client's share of so few rows is none
        raise too_few(settings, "client-0", 0) from None


def shards(settings: PartitionSettings, keys: Sequence[str], seed: int) -> Groups:
    """Rows sorted by label and cut into equal shards (to one row), dealt at random (McMahan et al. 2017, arXiv 1602.05629)."""
    ordered = sorted(range(len(keys)), key=lambda row: keys[row])
    pieces = np.array_split(np.asarray(ordered), settings.clients * settings.shards_per_client)
    hands = stream("partition", seed).permutation(len(pieces)).reshape(settings.clients, settings.shards_per_client)
    return [[int(row) for piece in hand for row in pieces[piece]] for hand in hands]


def divided(partitioner: Any, order: np.ndarray, clients: int, keys: Sequence[str] | None = None) -> Groups:
    """Row numbers of each client: the partitioner sees a table of row numbers (and keys), so that no data is copied through Arrow."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {"row": order.tolist()}
    if keys is not None:
        columns["key"] = [keys[row] for row in order]
    partitioner.dataset = Dataset.from_dict(columns)
    return [list(partitioner.load_partition(client)["row"]) for client in range(clients)]


def kept_values(settings: PartitionSettings, sizes: Mapping[str, int]) -> list[str]:
    """by = "column": the values that become clients, largest first, then by name. `sizes` maps a value to its characters or rows. Raises D205."""
    ordered = sorted(sizes, key=lambda value: (-sizes[value], value))
    if settings.all_values:
        return ordered
    if len(ordered) < settings.clients:
        raise FedtuneError(
            "D205",
            f"{len(ordered)} values in column '{settings.column}' for {settings.clients} clients",
            "at least one value per client",
            f"set partition.clients = {len(ordered)} or partition.all_values = true",
        )
    return ordered[: settings.clients]


def too_few(settings: PartitionSettings, name: str, rows: int) -> FedtuneError:
    """D205 for one client, with what would help."""
    help_ = {
        "dirichlet": "raise partition.alpha, lower partition.clients, or choose another seed",
        "column": "lower partition.clients, partition.min_rows or data.client_test_share",
    }.get(settings.by, "lower partition.clients or use more data")
    return FedtuneError("D205", f"{rows} training rows at client '{name}'", f"at least partition.min_rows = {settings.min_rows}", help_)
