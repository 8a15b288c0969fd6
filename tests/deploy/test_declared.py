"""How much data a site says it has: never less than there is."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.declared import PACKED, declared, heaviest
from fedtune.runtime.site_scores import SCORE
from tests import small


def test_rows_are_ends_of_lines_and_one_more(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".txt"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"one\ntwo\rthree")
        assert declared(str(path)) == {"rows": 3, "bytes": 13}
    large = tmp_path / "large.txt"
    large.write_bytes(b"x\n" * (1 << 20))
    assert declared(str(large)) == {"rows": (1 << 20) + 1, "bytes": 2 << 20}


def test_other_files_have_a_row_a_byte_or_are_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(bytes(10))
    (tmp_path / "b.png").write_bytes(bytes(99))
    packed = gzip.compress(b"one\n")
    (tmp_path / "c.jsonl.gz").write_bytes(packed)
    assert declared(str(tmp_path / "a.json")) == {"rows": 10, "bytes": 10}
    assert declared(str(tmp_path / "b.png")) == {"rows": 1, "bytes": 99}
    size = len(packed) * PACKED
    assert declared(str(tmp_path / "c.jsonl.gz")) == {"rows": size, "bytes": size}
    table = pytest.importorskip("pyarrow").table({"a": [1, 2, 3]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "d.parquet")
    assert declared(str(tmp_path / "d.parquet"))["rows"] == 3


def test_folders_count_all_that_is_in_them_and_several_places_add_up(tmp_path: Path) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name, content in (("in/a.txt", b"a\nb"), ("in/below/b.txt", b"c"), ("c.txt", b"d\n")):
        (tmp_path / name).write_bytes(content)
    one, two = str(tmp_path / "in"), str(tmp_path / "c.txt")
    assert declared(one) == {"rows": 3, "bytes": 4} and declared(one, two) == {"rows": 5, "bytes": 6}
    assert declared(two, "", str(tmp_path / "none")) == {"rows": 2, "bytes": 2}
    assert declared("") == {} == declared() == declared(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert declared(str(tmp_path / "empty")) == {}
    (tmp_path / "c.txt").write_bytes(b"\n\n")  # as long, and changed
    os.utime(tmp_path / "c.txt", ns=(1, 1))
    assert declared(two) == {"rows": 3, "bytes": 2}


def test_an_answer_weighs_what_was_declared_at_most(tiny_bert: Path, tmp_path: Path) -> None:
    recipe: Any = small.recipe(tiny_bert, small.write_rows(tmp_path))
    about = {"rows": 7, "bytes": 100}
    assert heaviest(recipe, about, "train") == 7.0 == heaviest(recipe, about, SCORE)
    none: list[dict[str, Any]] = [
        {},
        {"rows": 7},
        {"bytes": 7},
        {"rows": 0, "bytes": 1},
        {"rows": 1, "bytes": 0},
    ]
    for odd in (*none, {"rows": "7", "bytes": 1}):
        assert heaviest(recipe, odd, "train") == math.inf
