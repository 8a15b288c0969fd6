"""Every source gives the rows that were written for it, and says in one sentence what is wrong with its
files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtune.data.rows import Rows, Table, clean
from fedtune.data.sources import SOURCES, data_at
from fedtune.errors import FedtuneError
from tests.tables import data_of

LETTERS = [{"text": "alpha beta", "label": "a"}, {"text": "gamma delta", "label": "b"}]


def table(source: str, path: Path, **settings: Any) -> Table:
    data = data_of(source=source, path=str(path), **settings)
    return data.table()


def rows(source: str, path: Path | None = None, **settings: Any) -> Rows:
    """A source's rows in the task's shape."""
    data = data_of(source, **({"path": str(path)} if path else {}), **settings)
    read = data.table()
    return clean(data, read.rows, read.where, read.folder).rows


def refused(code: str, *named: str, source: str, path: Path | None = None, **settings: Any) -> None:
    with pytest.raises(FedtuneError) as caught:
        rows(source, path, **settings)
    assert caught.value.code == code
    assert [name for name in named if name not in str(caught.value)] == []


def lines(path: Path, *content: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_a_site_reads_its_own_kind_of_file(tmp_path: Path) -> None:
    recipe = data_of("plays", task="causal-lm", path="all.txt", encoding="latin-1")
    assert data_at(recipe, "mine.txt").source == "plays"
    mine = data_at(recipe, str(tmp_path / "mine.jsonl.gz"), limit=3)
    assert (mine.source, mine.task, mine.limit, mine.encoding) == ("jsonl", "causal-lm", 3, "latin-1")  # type: ignore[attr-defined]
    assert data_at(data_of("docstrings"), "mine.CSV").source == "csv"
    assert data_at(data_of("clinc150", path="x"), "folder").source == "clinc150"


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "alpha beta", "label": "a", "more": 1}\n\n{"text": "gamma delta", "label": "b"}'
    )
    assert rows("jsonl", path) == LETTERS
    assert rows("jsonl", path, task="causal-lm") == [{"text": "alpha beta"}, {"text": "gamma delta"}]


def test_a_folder_of_files_with_its_own_test_set(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", LETTERS[1])
    lines(tmp_path / "a.jsonl", LETTERS[0])
    lines(tmp_path / "test.jsonl", {"text": "omega", "label": "a"})
    (tmp_path / "notes.txt").write_text("not data")
    read = table("jsonl", tmp_path)
    assert (read.rows, read.test) == (LETTERS, [{"text": "omega", "label": "a"}])


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # more than the csv module's own limit
    path.write_text(f'text,label\n"alpha, ""beta""\nand more",a\n{long},7\n')
    assert rows("csv", path) == [
        {"text": 'alpha, "beta"\nand more', "label": "a"},
        {"text": long, "label": "7"},
    ]


def test_parquet_with_images_as_datasets_writes_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    square = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    buffer = io.BytesIO()
    Image.fromarray(square).save(buffer, "PNG")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"image": {"bytes": buffer.getvalue(), "path": None}, "label": 3}]),
        tmp_path / "a.parquet",
    )
    [row] = rows("parquet", tmp_path / "a.parquet", task="image-classify")
    assert row["label"] == "3"
    np.testing.assert_array_equal(row["image"], square)


def test_text_is_one_row_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("third\n")
    (tmp_path / "one.txt").write_text("first line\nand second\n\n \n\nsecond\n\n")
    assert table("text", tmp_path).rows == [
        {"text": "first line\nand second", "file": "one.txt"},
        {"text": "second", "file": "one.txt"},
        {"text": "third", "file": "two.txt"},
    ]


def test_plays(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("ROMEO:\nBut soft!\nWhat light?\n\n[Exit]\n\nFirst Citizen:\nSpeak.\n")
    read = table("plays", path, task="causal-lm")
    assert read.rows == [
        {"text": "ROMEO:\nBut soft!\nWhat light?\n\n", "speaker": "ROMEO"},
        {"text": "First Citizen:\nSpeak.\n\n", "speaker": "First Citizen"},
    ]
    assert read.dropped == {"paragraphs without a speaker's heading": 1}
    path.write_text("no heading here")
    refused("D202", "play.txt", source="plays", path=path, task="causal-lm")


def test_clinc150(tmp_path: Path) -> None:
    full = {
        "train": [["pay it", "bill"], ["wake me", "alarm"]],
        "test": [["paid?", "bill"]],
        "val": [["x", "bill"]],
        "oos_train": [["?", "oos"]],
        "oos_test": [["!", "oos"]],
    }
    (tmp_path / "data_full.json").write_text(json.dumps(full))
    refused("D201", "domains.json", source="clinc150", path=tmp_path)
    (tmp_path / "domains.json").write_text(json.dumps({"bank": ["bill"], "home": ["alarm"]}))
    read = table("clinc150", tmp_path)
    assert read.rows == [
        {"text": "pay it", "label": "bill", "domain": "bank"},
        {"text": "wake me", "label": "alarm", "domain": "home"},
    ]
    assert read.test == [{"text": "paid?", "label": "bill", "domain": "bank"}]
    assert read.dropped == {"out of scope (all splits)": 2, "validation split": 1}
    (tmp_path / "domains.json").write_text(json.dumps({"bank": ["bill"]}))
    refused("D203", "alarm", source="clinc150", path=tmp_path)


def test_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "1.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    expected = [{"image": str(tmp_path / name / "1.png"), "label": name} for name in ("cat", "dog")]
    assert rows("images", tmp_path, task="image-classify") == expected
    assert table("images", tmp_path, task="image-classify").dropped == {
        "files and folders that are no images": 1
    }
    (tmp_path / "eel").mkdir()
    refused("D202", "eel", source="images", path=tmp_path, task="image-classify")


def test_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    found = rows("digits", task="image-classify")
    bunch = sklearn.load_digits()
    assert [row["label"] for row in found] == [str(label) for label in bunch.target]
    assert found[0]["image"].dtype == np.uint8 and found[0]["image"].shape == (8, 8, 1)
    np.testing.assert_allclose(
        np.stack([row["image"][:, :, 0] for row in found]) / 255, bunch.images / 16, atol=0.5 / 255 + 1e-9
    )
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused("D208", "scikit-learn", source="digits", task="image-classify")


def test_hub_reads_local_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    saved = datasets.Dataset.from_dict(
        {"text": ["alpha beta", "gamma delta"], "label": [0, 1]}, features=features
    )
    saved.save_to_disk(tmp_path / "saved")
    assert rows("hub", tmp_path / "saved") == LETTERS
    datasets.DatasetDict({"train": saved.select([0]), "extra": saved.select([1])}).save_to_disk(
        tmp_path / "dict"
    )
    assert rows("hub", tmp_path / "dict", split="extra") == LETTERS[1:]
    (tmp_path / "plain").mkdir()
    lines(tmp_path / "plain" / "train.jsonl", *LETTERS)
    assert rows("hub", tmp_path / "plain") == LETTERS
    refused("D201", "no split 'test'", "plain", source="hub", path=tmp_path / "plain", split="test")


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet", "text", "plays", "clinc150", "images", "hub"])
def test_a_missing_path_is_named(source: str, tmp_path: Path) -> None:
    refused("D201", "nowhere", source=source, path=tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["jsonl", "csv", "text", "plays"])
def test_an_empty_file_is_named(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n" if source == "jsonl" else "")
    refused("D202", "empty", source=source, path=tmp_path / "empty", task="causal-lm")


@pytest.mark.parametrize("source", ["jsonl", "parquet", "images"])
def test_an_empty_folder_is_named(source: str, tmp_path: Path) -> None:
    refused("D202", str(tmp_path), source=source, path=tmp_path, task="image-classify")


@pytest.mark.parametrize("bad", [b'{"text": ', b"[1]", b"nonsense", b'{"text": "\xff"}'])
def test_a_bad_json_line_is_numbered(bad: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x", "label": "a"}\n\n' + bad + b"\n")
    refused("D203", "line 3", "a.jsonl", source="jsonl", path=tmp_path / "a.jsonl")


def test_other_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\ny\n")
    refused("D203", "line 3", "a.csv", source="csv", path=tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    refused("D203", "a.parquet", source="parquet", path=tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    refused("D203", "a.txt", "byte 3", source="text", path=tmp_path / "a.txt", task="causal-lm")


@pytest.mark.parametrize(
    ("row", "settings", "code", "named"),
    [
        ({"body": "x", "label": "a"}, {}, "D204", ["'text'", "body, label", "data.text"]),
        ({"text": "x", "class": "a"}, {}, "D204", ["'label'", "class, text", "data.label"]),
        ({"text": 5, "label": "a"}, {}, "D203", ["int 5", "'text'"]),
        ({"text": "x", "label": 1.5}, {}, "D203", ["float 1.5"]),
        ({"text": "x", "label": "c"}, {"labels": ("a", "b")}, "D206", ["'c'", "a, b"]),
        ({"prompt": "x"}, {"task": "instruct"}, "D204", ["'response'", "data.response"]),
        ({"chat": "hello"}, {"task": "instruct", "messages": "chat"}, "D203", ["'chat'", "role"]),
        ({"chat": [{"role": "user"}]}, {"task": "instruct", "messages": "chat"}, "D203", ["'chat'"]),
        ({"image": [[1, 2]], "label": "a"}, {"task": "image-classify"}, "D203", ["'image'", "uint8"]),
    ],
)
def test_a_bad_cell_is_named_with_its_row(
    row: dict[str, Any], settings: dict[str, Any], code: str, named: list[str], tmp_path: Path
) -> None:
    good = {
        "text": "x",
        "label": "a",
        "prompt": "p",
        "response": "r",
        "chat": [{"role": "user", "content": "c"}],
        "image": "x.png",
    }
    refused(
        code,
        "row 2 of",
        "a.jsonl",
        *named,
        source="jsonl",
        path=lines(tmp_path / "a.jsonl", good, row),
        **settings,
    )


def test_shapes_of_instructions_and_numbers_as_labels(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = lines(
        tmp_path / "a.jsonl", {"q": "hi", "a": "ho", "chat": [{**turns[0], "id": 7}, turns[1]], "kind": 3}
    )
    assert rows("jsonl", path, task="instruct", prompt="q", response="a") == [
        {"prompt": "hi", "response": "ho"}
    ]
    assert rows("jsonl", path, task="instruct", messages="chat") == [
        {"messages": [{**turns[0], "id": 7}, turns[1]]}
    ]
    assert rows("jsonl", path, text="q", label="kind") == [{"text": "hi", "label": "3"}]
    assert rows("jsonl", path, task="image-classify", image="q", label="kind") == [
        {"image": str(tmp_path / "hi"), "label": "3"}
    ]  # beside the file


# --- laws of every source ---


def made_for(source: str, folder: Path) -> dict[str, Any]:
    """Options of a source that reads a few rows from this folder. A newcomer is enrolled by its line here,
    and missing without one."""
    pairs = [[row["text"], row["label"]] for row in LETTERS]
    if source == "digits":
        return {}
    if source == "docstrings":
        return {"packages": ("networkx",), "per_package": 3}
    if source == "facts":
        return {"each": 2}
    if source == "docstring-questions":
        return {"packages": ("networkx",), "per_package": 3}
    if source == "clinc150":
        (folder / "data_full.json").write_text(json.dumps({"train": pairs, "test": pairs}))
        (folder / "domains.json").write_text(json.dumps({"letters": ["a", "b"]}))
        return {"path": str(folder)}
    if source == "images":
        for label in ("a", "b"):
            (folder / label).mkdir()
            Image.new("RGB", (4, 4)).save(folder / label / "1.png")
        return {"path": str(folder)}
    if source == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LETTERS), folder / "rows.parquet")
    elif source == "hub":
        import datasets

        datasets.Dataset.from_list(LETTERS).save_to_disk(str(folder / "rows.hub"))
    else:
        lines_ = {
            "jsonl": [json.dumps(row) for row in LETTERS],
            "csv": ["text,label", "alpha beta,a", "gamma delta,b"],
        }
        texts = {
            "text": "alpha beta\n\ngamma delta\n",
            "plays": "First:\nalpha beta\n\nSecond:\ngamma delta\n",
        }
        (folder / f"rows.{source}").write_text(texts.get(source) or "\n".join(lines_[source]) + "\n")
    return {"path": str(next(folder.iterdir()))}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_reads_the_same_rows_twice_in_the_shape_of_each_of_its_tasks(
    source: str, tmp_path: Path
) -> None:
    cls = SOURCES[source]
    if source == "digits":
        pytest.importorskip("sklearn")
    options = made_for(source, tmp_path)
    other = {"instruct", "preference"}  # which have columns of their own: test_pairs.py, test_docstring_...
    for task in sorted(
        cls.tasks - other - ({"image-classify"} if source not in ("images", "digits") else set())
    ):
        label = "speaker" if source == "plays" else "label"
        data = data_of(source, task=task, label=label, **options)
        first, second = (
            clean(data, read.rows, read.where, read.folder).rows for read in (data.table(), data.table())
        )
        assert len(first) >= 2 and all(
            np.array_equal(one["image"], two["image"]) if "image" in one else one == two
            for one, two in zip(first, second, strict=True)
        )
        assert all(
            set(row)
            == (
                {"text"}
                if task == "causal-lm"
                else {"image", "label"}
                if task == "image-classify"
                else {"text", "label"}
            )
            for row in first
        )
    if "path" in cls.model_fields:
        gone = data_of(source, **{**options, "path": str(tmp_path / "nowhere")}, task=sorted(cls.tasks)[0])
        with pytest.raises(FedtuneError, match="D201"):
            gone.table()
