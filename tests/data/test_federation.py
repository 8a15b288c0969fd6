"""From a file to a federation: who trains on what, what is held out, what is left out and told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedtune.data import Federation, Slice, histogram, load, load_slice
from fedtune.data.partition import PARTITIONS, Partition
from fedtune.data.settings import Source
from fedtune.errors import FedtuneError
from tests.tables import data_of, partition_of
from tests.waiting import PATIENCE

IID = partition_of(by="iid", clients=4)


def numbered(path: Path, rows: int = 200) -> Path:
    """Row n has the text "n", one of five labels and one of four owners (of unequal shares)."""
    owners = ["ann", "ann", "bob", "cid", "dora", "dora", "dora"]
    path.write_text(
        "".join(
            json.dumps({"text": str(n), "label": n % 5, "owner": owners[n % 7]}) + "\n" for n in range(rows)
        )
    )
    return path


def settings(path: Path, **more: Any) -> Source:
    return data_of(source="jsonl", path=str(path), **more)


def numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [int(row["text"]) for row in rows]


def everywhere(federation: Federation) -> list[int]:
    return sorted(
        n
        for part in [federation.test, *(p for c in federation.clients for p in (c.train, c.test))]
        for n in numbers(part)
    )


def refused(code: str, *named: str, data: Source, partition: Partition = IID) -> None:
    with pytest.raises(FedtuneError) as caught:
        load(data, partition, 1)
    assert caught.value.code == code
    assert [name for name in named if name not in str(caught.value)] == []


@pytest.mark.parametrize("by", PARTITIONS)
def test_every_row_lands_in_exactly_one_place(by: str, tmp_path: Path) -> None:
    data = settings(numbered(tmp_path / "a.jsonl"), client_test_share=0.25)
    partition = partition_of(
        by, clients=4, **{"dirichlet": {"alpha": 2.0}, "column": {"column": "owner"}}.get(by, {})
    )
    made = load(data, partition, 1)
    assert everywhere(made) == list(range(200))
    assert made == load(data, partition, 1)
    assert made != load(data, partition, 2)
    assert [client.id for client in made.clients] == [0, 1, 2, 3]
    assert (made.labels, made.dropped) == (("0", "1", "2", "3", "4"), {})
    assert len(made.test) == 20
    assert all(len(c.train) == int(0.75 * (len(c.train) + len(c.test))) for c in made.clients)


def test_natural_clients_are_named_and_ordered_by_size(tmp_path: Path) -> None:
    data = settings(numbered(tmp_path / "a.jsonl", 70), test_share=0.0)
    made = load(data, partition_of(by="column", column="owner", clients=2), 1)
    assert [(c.name, len(c.train) + len(c.test)) for c in made.clients] == [("dora", 30), ("ann", 20)]
    assert made.dropped == {"other values of 'owner' than the 2 clients": 20}
    assert made.clients[1].train[0].keys() == {"text", "label"}
    everyone = load(data, partition_of(by="column", column="owner", clients=2, all_values=True), 1)
    assert [c.name for c in everyone.clients] == ["dora", "ann", "bob", "cid"]


def test_text_counts_by_characters(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("BRIEF:\nNo.\n\nLONG:\nA very long speech indeed.\n\nBRIEF:\nYes.\n\nMUTE:\n.\n")
    made = load(
        data_of(source="plays", path=str(path), task="causal-lm", test_share=0, client_test_share=0),
        partition_of(by="column", column="speaker", clients=2),
        1,
    )
    assert [(c.name, len(c.train)) for c in made.clients] == [("LONG", 1), ("BRIEF", 2)]
    assert made.labels == ()


def test_by_time_the_last_rows_are_held_out_and_pooled(tmp_path: Path) -> None:
    data = settings(numbered(tmp_path / "a.jsonl", 70), test_share=0.0, client_test_share=0.2, order="time")
    made = load(data, partition_of(by="column", column="owner", clients=4), 1)
    for client in made.clients:
        assert numbers(client.train + client.test) == sorted(numbers(client.train + client.test))
        assert len(client.train) == int(0.8 * (len(client.train) + len(client.test)))
    assert made.test == [row for client in made.clients for row in client.test]


def test_at_random_the_seed_holds_out(tmp_path: Path) -> None:
    made = load(settings(numbered(tmp_path / "a.jsonl"), test_share=0.0, client_test_share=0.5), IID, 1)
    assert all(max(numbers(c.train)) > min(numbers(c.test)) for c in made.clients)
    assert made.test == [row for client in made.clients for row in client.test]


def test_a_test_set_of_its_own_is_used_whole(tmp_path: Path) -> None:
    numbered(tmp_path / "train.jsonl", 100)
    (tmp_path / "test.jsonl").write_text(
        "".join(
            json.dumps({"text": str(n), "label": "5", "owner": owner}) + "\n"
            for n, owner in ((100, "ann"), (101, "bob"))
        )
    )
    made = load(settings(tmp_path, test_share=0.5), IID, 1)
    assert numbers(made.test) == [100, 101]
    assert everywhere(made) == list(range(102))
    assert made.labels == ("0", "1", "2", "3", "4", "5")
    few = load(settings(tmp_path), partition_of(by="column", column="owner", clients=2), 1)  # dora and ann
    assert numbers(few.test) == [100]


def test_dirichlet_can_skew_another_column(tmp_path: Path) -> None:
    data = settings(
        numbered(tmp_path / "a.jsonl", 700), task="causal-lm", test_share=0.0, client_test_share=0.0
    )
    made = load(data, partition_of(by="shards", column="owner", clients=7, shards_per_client=1), 1)
    owners = ["ann", "ann", "bob", "cid", "dora", "dora", "dora"]
    assert Counter(owner for c in made.clients for owner in {owners[n % 7] for n in numbers(c.train)}) == {
        "ann": 2,
        "bob": 1,
        "cid": 1,
        "dora": 3,
    }


def test_limit_and_blank_texts_are_counted(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl")
    with path.open("a") as handle:
        handle.write('{"text": "  ", "label": 1}\n')
    made = load(settings(path, limit=50), IID, 1)
    assert len(everywhere(made)) == len(set(everywhere(made))) == 50
    assert made.dropped == {"an empty text, response or label": 1, "more than data.limit = 50": 150}


def test_the_label_set_is_the_recipes_where_it_has_one(tmp_path: Path) -> None:
    labels = ("4", "3", "2", "1", "0", "unused")
    assert load(settings(numbered(tmp_path / "a.jsonl"), labels=labels), IID, 1).labels == labels
    refused(
        "D206", "the label '4'", "row 5", data=settings(tmp_path / "a.jsonl", labels=("0", "1", "2", "3"))
    )


def test_a_client_with_too_few_rows_is_named(tmp_path: Path) -> None:
    data = settings(numbered(tmp_path / "a.jsonl", 60))
    refused(
        "D205",
        "client 'client-",
        "min_rows = 1",
        "raise partition.alpha",
        data=data,
        partition=partition_of(clients=20, alpha=0.01),
    )
    refused(
        "D205",
        "12 training rows",
        "min_rows = 14",
        data=data,
        partition=partition_of(by="iid", clients=4, min_rows=14),
    )
    refused(
        "D205",
        "client 'bob'",
        "partition.clients",
        data=settings(tmp_path / "a.jsonl", test_share=0.0),
        partition=partition_of(by="column", column="owner", clients=4, min_rows=9),
    )


def test_a_missing_partition_column_is_named(tmp_path: Path) -> None:
    refused(
        "D204",
        "'place'",
        "label, owner, text",
        "partition.column",
        data=settings(numbered(tmp_path / "a.jsonl")),
        partition=partition_of(by="column", column="place"),
    )


def test_nothing_left_after_cleaning_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "", "label": "a"}\n')
    refused("D202", "a.jsonl", data=settings(tmp_path / "a.jsonl"))


def test_a_site_has_its_own_rows_only(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    labels = ("0", "1", "2", "3", "4")
    mine, dropped = load_slice(
        settings(path, labels=labels, client_test_share=0.25), seed=1, id=3, name="clinic"
    )
    assert (mine.id, mine.name, len(mine.train), len(mine.test), dropped) == (3, "clinic", 15, 5, {})
    assert sorted(numbers(mine.train + mine.test)) == list(range(20))
    with pytest.raises(FedtuneError, match=r"data\.labels") as caught:
        load_slice(settings(path), seed=1)
    assert caught.value.code == "D206"


def test_the_built_in_federation() -> None:
    made = load(data_of(per_package=40), partition_of(), 1)
    assert len(made.clients) == 8 and len(made.labels) == 10
    assert len(made.test) + sum(len(c.train) + len(c.test) for c in made.clients) == 400
    assert (
        len({row["text"] for row in made.test} & {row["text"] for c in made.clients for row in c.train}) == 0
    )


def test_histogram() -> None:
    assert histogram([{"label": "b"}, {"label": "a"}, {"label": "b"}]) == {"a": 1, "b": 2}
    assert list(histogram([{"label": "b"}, {"label": "a"}])) == ["a", "b"]
    assert histogram([{"text": "x"}]) == {}


def test_settings_import_nothing_heavy() -> None:
    probe = (
        "import sys, fedtune.data.settings; print(sorted({'numpy', 'torch', 'datasets', 'pyarrow', 'PIL'} & "
        "sys.modules.keys()))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", probe], check=True, capture_output=True, text=True, timeout=PATIENCE
        ).stdout.strip()
        == "[]"
    )
    probe = (
        "import sys, fedtune.data.federation; print(sorted({'torch', 'datasets', 'pyarrow', 'PIL', "
        "'flwr_datasets'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", probe], check=True, capture_output=True, text=True, timeout=PATIENCE
        ).stdout.strip()
        == "[]"
    )
    assert Slice(0, "a", [], []).train == []
