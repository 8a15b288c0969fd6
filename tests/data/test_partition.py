"""Every partition: disjoint, complete, the same for the same seed; and each does what its name says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedtune.data.partition import PARTITIONS
from fedtune.errors import FedtuneError
from fedtune.rng import seed_of, stream
from tests.tables import partition_of

KEYS = [str(number % 10) for number in range(1003)]  # ten labels, in turn; 1003 divides by nothing here


def groups(by: str, seed: int = 1, keys: list[str] = KEYS, **settings: float) -> list[list[int]]:
    return [group for _, group in partition_of(by, **settings).groups(keys, seed)]


def skew(by: str, seed: int, **settings: float) -> float:
    """Mean over clients of the share of their commonest label: 0.1 is even, 1.0 is one label each."""
    return float(
        np.mean(
            [
                max(Counter(KEYS[row] for row in group).values()) / len(group)
                for group in groups(by, seed, **settings)
                if group
            ]
        )
    )


@pytest.mark.parametrize("by", [by for by, partition in PARTITIONS.items() if not partition.by_value])
def test_every_row_has_one_client_and_the_seed_decides(by: str) -> None:
    made = groups(by)
    assert len(made) == 8
    assert sorted(row for group in made for row in group) == list(range(1003))
    assert all(group == sorted(group) for group in made)  # file order within a client
    assert made == groups(by)
    assert made != groups(by, seed=2)


def test_iid_is_even_in_size_and_labels() -> None:
    assert sorted({len(group) for group in groups("iid")}) == [125, 126]
    assert skew("iid", 1) < 0.2


def test_dirichlet_equals_its_naive_twin() -> None:
    rng = np.random.default_rng(seed_of("partition", 3))
    twin: list[list[int]] = [[] for _ in range(8)]
    for label in sorted(set(KEYS)):
        members = [row for row, key in enumerate(KEYS) if key == label]
        ends = [*(int(x * len(members)) for x in np.cumsum(rng.dirichlet([0.3] * 8))[:-1]), len(members)]
        for client, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            twin[client] += members[start:end]
    assert groups("dirichlet", 3, alpha=0.3) == [sorted(group) for group in twin]


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    even, middle, skewed = (
        np.mean([skew("dirichlet", seed, alpha=alpha) for seed in range(3)]) for alpha in (100.0, 1.0, 0.1)
    )
    assert even < 0.15 < middle < 0.5 < skewed


def test_shards_give_each_client_few_labels() -> None:
    made = groups("shards", shards_per_client=2)
    assert {len(group) for group in made} <= {124, 125, 126}  # two shards of 62 or 63
    assert all(
        len({KEYS[row] for row in group}) <= 4 for group in made
    )  # a shard touches at most two labels of a hundred rows
    assert all(
        len({KEYS[row] for row in group}) == 1
        for group in groups("shards", clients=10, shards_per_client=1, keys=KEYS[:1000])
    )


def test_size_skews_sizes_and_not_labels() -> None:
    made = groups("size", clients=4, keys=KEYS[:1000])
    assert [len(group) for group in made] == [100, 200, 300, 400]
    assert all(max(Counter(KEYS[row] for row in group).values()) < 0.2 * len(group) for group in made)


def test_column_keeps_the_largest_values_then_by_name() -> None:
    sizes = {"b": 5, "a": 5, "c": 9, "d": 1}
    assert partition_of(by="column", column="who", clients=3).values(sizes) == ["c", "a", "b"]
    assert partition_of(by="column", column="who", clients=1, all_values=True).values(sizes) == [
        "c",
        "a",
        "b",
        "d",
    ]
    with pytest.raises(
        FedtuneError, match=r"4 values in column 'who' for 5 clients.*partition.clients = 4"
    ) as caught:
        partition_of(by="column", column="who", clients=5).values(sizes)
    assert caught.value.code == "D205"


@pytest.mark.parametrize("by", ["iid", "dirichlet", "shards", "size"])
def test_fewer_rows_than_clients_is_told(by: str) -> None:
    with pytest.raises(FedtuneError, match="3 rows for 8 clients") as caught:
        groups(by, keys=["a", "b", "a"])
    assert caught.value.code == "D205"


def test_a_size_of_nothing_is_told() -> None:
    with pytest.raises(
        FedtuneError, match=r"0 training rows at client 'client-0'.*lower partition.clients"
    ) as caught:
        groups("size", keys=KEYS[:20])  # the first of eight is due 20 / 36 of a row
    assert caught.value.code == "D205"


@pytest.mark.parametrize("rows", [8, 37, 100, 1003])
@pytest.mark.parametrize("by", ["iid", "size"])
def test_shares_are_those_of_flwr_datasets(by: str, rows: int) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner, LinearPartitioner

    order = stream("partition", 5).permutation(rows).tolist()
    theirs = {"iid": IidPartitioner, "size": LinearPartitioner}[by](8)
    theirs.dataset = Dataset.from_dict({"row": order})
    keys = KEYS[:rows]
    try:
        wanted = [sorted(theirs.load_partition(client)["row"]) for client in range(8)]
    except ValueError:
        with pytest.raises(FedtuneError, match="D205"):
            groups(by, 5, keys)
    else:
        assert groups(by, 5, keys) == wanted
