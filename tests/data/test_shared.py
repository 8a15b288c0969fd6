"""Rows that all clients mix into their own: how many, which, and from where at a real site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.data import load
from fedtune.deploy.declared import declared
from fedtune.deploy.sites import at_site
from fedtune.errors import FedtuneError
from tests import small


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared.jsonl"
    rows = [{"text": f"the song plays {'slow ' * n}", "label": "music"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(rows: Path, **changes: Any) -> Any:
    return small.recipe(Path("model"), rows, **changes)


def federation(made: Any) -> Any:
    return load(made.data, made.partition, made.seed)


@pytest.mark.parametrize(("share", "each"), [(0.1, 2), (0.2, 5), (0.5, 21)])
def test_a_share_of_every_clients_rows_is_shared(
    share: float, each: int, shared: Path, tmp_path: Path
) -> None:
    rows = small.write_rows(tmp_path)
    plain = federation(recipe(rows))
    made = federation(recipe(rows, data__shared=str(shared), data__share=share))
    texts = [json.loads(line)["text"] for line in shared.read_text().splitlines()]
    for before, after in zip(plain.clients, made.clients, strict=True):
        assert after.train[: len(before.train)] == before.train and after.test == before.test
        more = [row["text"] for row in after.train[len(before.train) :]]
        assert len(more) == each == round(len(before.train) * share / (1 - share))
        counts = [more.count(text) for text in texts]
        assert sum(counts) == each and max(counts) - min(counts) <= 1  # all of them before any comes again
    assert len({json.dumps(one.train[-each:]) for one in made.clients}) == 1  # the same for all
    assert made.test == plain.test
    assert federation(recipe(rows, data__shared=str(shared))).fingerprint == plain.fingerprint


def test_a_site_reads_its_own_copy_and_nothing_that_a_recipe_names(shared: Path, tmp_path: Path) -> None:
    rows = small.write_rows(tmp_path)
    secret = tmp_path / "secret.jsonl"
    made = recipe(
        Path("nowhere.jsonl"),
        data__shared=str(secret),
        data__share=0.2,
        data__labels=sorted(small.WORDS),
        deploy={"sites": ["a"]},
    )
    with pytest.raises(FedtuneError, match="--shared") as caught:
        at_site(made, 0, str(rows))
    assert caught.value.code == "D201"
    mine = at_site(made, 0, str(rows), shared=str(shared)).clients[0].train
    assert len(mine) == 108 + 27 and sum(row["text"].startswith("the song plays") for row in mine) >= 27
    known = [declared(str(rows)), declared(str(shared))]
    assert declared(str(rows), str(shared)) == {key: known[0][key] + known[1][key] for key in known[0]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__share": 0.1}, "without data.shared"),
        ({"data__share": 1.0}, "data.share"),
        (
            {
                "data__share": 0.1,
                "data__shared": "x.jsonl",
                "method__train__private": {"max_grad_norm": 1.0, "sample_rate": 0.1},
            },
            "does not depend on others",
        ),
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=said):
        recipe(tmp_path / "rows.jsonl", **changes)


def test_a_file_without_rows_is_a_mistake(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"text": " ", "label": "music"}) + "\n")
    made = recipe(small.write_rows(tmp_path), data__shared=str(empty), data__share=0.1)
    with pytest.raises(FedtuneError, match=r"correct data\.shared"):
        federation(made)
