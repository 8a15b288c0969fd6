"""Forms that everybody has: splits in names, folders of clients, compressed files, arrays, other delimiters
and encodings, deep pixels, repeats."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedtune import config
from fedtune.data import Federation, load
from fedtune.data.partition import Partition
from fedtune.errors import FedtuneError
from fedtune.images import to_eight_bits
from tests.tables import data_of, partition_of

IID = partition_of(by="iid", clients=1)
WHOLE = {"test_share": 0.0, "client_test_share": 0.0}


def made(start: int, count: int, label: Any = None) -> list[dict[str, Any]]:
    return [
        {"text": f"text {number}", "label": label if label is not None else "ab"[number % 2]}
        for number in range(start, start + count)
    ]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(
    path: Path | str | tuple[str, ...], source: str = "jsonl", partition: Partition = IID, **settings: Any
) -> Federation:
    place = path if isinstance(path, tuple) else str(path)
    return load(data_of(source=source, path=place, **({"test_share": 0.2} | settings)), partition, 1)  # type: ignore[arg-type]


def texts(federation: Federation) -> list[str]:
    return sorted(
        row["text"] for client in federation.clients for part in (client.train, client.test) for row in part
    )


# --- splits that a user made ---


@pytest.mark.parametrize(
    "names",
    [
        ("train", "validation", "test"),
        ("train-00000-of-00002", "dev", "holdout-1"),
        ("squad_train", "squad_val", "squad_test"),
    ],
)
def test_a_split_in_the_files_names_is_respected(names: tuple[str, ...], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        lines(tmp_path / f"{name}.jsonl", made(10 * number, 10))
    found = opened(tmp_path)
    assert texts(found) == [f"text {n}" for n in range(10)] and sorted(row["text"] for row in found.test) == [
        f"text {n}" for n in range(20, 30)
    ]
    assert found.dropped == {"a validation split, which is neither trained nor tested on": 10}


def test_without_a_test_split_the_validation_split_is_the_test_set_and_that_is_said(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", made(0, 10))
    lines(tmp_path / "valid.jsonl", made(10, 4))
    found = opened(tmp_path)
    assert len(found.test) == 4 and "valid.jsonl is the test set" in found.notes[0] and not found.dropped


def test_folders_can_be_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        lines(tmp_path / name / "rows.jsonl", made(10 * number, 10))
    found = opened(tmp_path)
    assert len(texts(found)) == 10 and len(found.test) == 10 and sum(found.dropped.values()) == 10


@pytest.mark.parametrize("names", [("train", "patients"), ("test",), ("dev", "test")])
def test_names_that_tell_half_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        lines(tmp_path / f"{name}.jsonl", made(0, 4))
    with pytest.raises(FedtuneError, match="D202"):
        opened(tmp_path)


def test_a_folder_for_each_client(tmp_path: Path) -> None:
    for number, site in enumerate(("north", "south", "east")):
        lines(tmp_path / site / "rows.jsonl", made(10 * number, 6 + number))
        lines(tmp_path / site / ".ipynb_checkpoints" / "rows.jsonl", made(90, 3))
    found = opened(
        tmp_path,
        partition=config.parse(
            {"data": {"path": "x", "source": "jsonl"}, "partition": {"by": "column", "column": "folder"}}
        ).partition,
    )
    assert {client.name for client in found.clients} == {"north", "south", "east"}


# --- forms of files ---


def write_forms(folder: Path) -> dict[str, tuple[Path, str]]:
    rows = made(0, 8)
    plain = "".join(json.dumps(row) + "\n" for row in rows)
    table = "".join(f"{row['text']};{row['label']}\n" for row in rows)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(plain.encode()))
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    (folder / "a.ndjson").write_text("\n" + plain)
    (folder / "a.csv").write_text("text;label\n" + table)
    (folder / "a.tsv").write_text(("text;label\n" + table).replace(";", "\t"))
    (folder / "a16.csv").write_bytes(("text,label\n" + table.replace(";", ",")).encode("utf-16"))
    (folder / "b.csv.gz").write_bytes(
        gzip.compress(("\ufefftext,label\r\n" + table.replace(";", ",").replace("\n", "\r\n")).encode())
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return {
        name: (folder / name, source)
        for name, source in (
            ("a.jsonl.gz", "jsonl"),
            ("a.json", "jsonl"),
            ("a.ndjson", "jsonl"),
            ("a.csv", "csv"),
            ("a.tsv", "csv"),
            ("a16.csv", "csv"),
            ("b.csv.gz", "csv"),
            ("a.parquet", "parquet"),
        )
    }


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    want = [f"text {n}" for n in range(8)]
    for name, (path, source) in write_forms(tmp_path).items():
        assert texts(opened(path, source, **WHOLE | {"client_test_share": 0.2})) == want, name


def test_patterns_and_lists_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        lines(tmp_path / f"part-{number}.jsonl", made(4 * number, 4))
    lines(tmp_path / ".part-9.jsonl", made(90, 4))
    share = {"test_share": 0.0, "client_test_share": 0.2}
    assert len(texts(opened(tmp_path / "part-*.jsonl", **share))) == 12
    assert len(texts(opened((str(tmp_path / "part-0.jsonl"), str(tmp_path / "part-2.jsonl")), **share))) == 8
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(texts(opened("~/part-1.jsonl", **share))) == 4
    with pytest.raises(FedtuneError, match=r"D201.*nothing-\*"):
        opened(tmp_path / "nothing-*.jsonl")


def test_another_encoding_is_named_and_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nGrüße,a\nrain,b\nfog,a\nsun,b\n".encode("cp1252"))
    with pytest.raises(
        FedtuneError, match=r"D203.*not UTF-8 at byte 13, in line 2.*data.encoding \(perhaps 'cp1252'\)"
    ):
        opened(tmp_path / "a.csv", "csv")
    assert "Grüße" in texts(
        opened(tmp_path / "a.csv", "csv", encoding="cp1252", **WHOLE | {"client_test_share": 0.3})
    )


def test_labels_as_truth_values_and_whole_floats(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": n % 2 == 0} for n in range(8)]
    assert opened(lines(tmp_path / "a.jsonl", rows)).labels == ("false", "true")
    pq.write_table(
        pa.Table.from_pylist([{"text": f"t{n}", "label": float(n % 3)} for n in range(9)]),
        tmp_path / "a.parquet",
    )
    assert opened(tmp_path / "a.parquet", "parquet").labels == ("0", "1", "2")


def test_nothing_in_a_text_is_an_empty_text_and_counted(tmp_path: Path) -> None:
    found = opened(
        lines(tmp_path / "a.jsonl", [*made(0, 8), {"text": None, "label": "a"}, {"text": "x", "label": None}])
    )
    assert found.dropped == {"an empty text, response or label": 2} and found.labels == ("a", "b")


# --- repeats and labels that look alike ---


def test_rows_that_are_trained_and_tested_on_are_told_or_dropped(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", [*made(0, 10), *made(0, 2)])
    lines(tmp_path / "test.jsonl", made(8, 6))
    kept, dropped = (opened(tmp_path, duplicates=how, client_test_share=0.0) for how in ("keep", "drop"))
    assert (
        kept.notes[0].startswith("2 of 6 rows of the test set stand among the training rows too")
        and not kept.dropped
    )
    assert texts(dropped) == [f"text {n}" for n in range(8)] and not dropped.notes and len(dropped.test) == 6
    assert dropped.dropped == {"rows that stand twice": 2, "training rows that stand in the test set": 2}


def test_labels_that_differ_in_case_or_blanks_are_told(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": ("yes", "Yes", "yes ", "no")[n % 4]} for n in range(16)]
    (note,) = opened(lines(tmp_path / "a.jsonl", rows)).notes
    assert (
        note
        == "the labels 'Yes', 'yes', 'yes ' are different classes, though they differ in case or blanks only"
    )


# --- pictures ---


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_deep_pixels_are_refused_everywhere(mode: str) -> None:
    with pytest.raises(ValueError, match="do not fit in 8 bits"):
        to_eight_bits(Image.new(mode, (4, 4)))


def test_deep_pictures_in_parquet_are_refused_as_in_a_folder(tmp_path: Path) -> None:
    deep = np.full((4, 4), 30000, np.uint16)
    pq.write_table(
        pa.Table.from_pylist([{"image": {"bytes": png(deep), "path": None}, "label": "a"}] * 4),
        tmp_path / "a.parquet",
    )
    with pytest.raises(FedtuneError, match=r"D203.*row 1.*I;16"):
        opened(tmp_path / "a.parquet", "parquet", task="image-classify")


def test_palettes_transparency_and_orientation() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_eight_bits(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6  # the camera was held on its side
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=turned.getexif())
    assert to_eight_bits(Image.open(file)).size == (2, 4)
    assert (
        to_eight_bits(Image.new("P", (2, 2))).mode == "RGB"
        and to_eight_bits(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == 7
    )


def pictures(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(np.full((4, 4), number, np.uint8)))


def test_hidden_folders_and_files_are_no_classes(tmp_path: Path) -> None:
    for name in ("dune", "lake", ".ipynb_checkpoints", "__MACOSX"):
        pictures(tmp_path / name)
    (tmp_path / "dune" / "._0.png").write_bytes(b"apple")
    found = opened(tmp_path, "images", task="image-classify")
    assert found.labels == ("dune", "lake") and found.dropped == {"files and folders that are no images": 3}


def test_picture_folders_with_splits_and_with_sites(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("dune", "lake"):
            pictures(tmp_path / "split" / split / name, 4 if split == "train" else 2)
    found = opened(tmp_path / "split", "images", task="image-classify", client_test_share=0.0)
    assert (sum(len(c.train) for c in found.clients), len(found.test), found.labels) == (
        8,
        4,
        ("dune", "lake"),
    )
    for site in ("north", "south"):
        for name in ("dune", "lake"):
            pictures(tmp_path / "sites" / site / name, 4)
    by_site = partition_of(by="column", column="folder", clients=2)
    assert [c.name for c in opened(tmp_path / "sites", "images", by_site, task="image-classify").clients] == [
        "north",
        "south",
    ]


def test_clients_by_a_column_are_as_many_as_its_values_unless_told_otherwise() -> None:
    def read(**partition: Any) -> Partition:
        return config.parse(
            {
                "data": {"source": "jsonl", "path": "x"},
                "partition": {"by": "column", "column": "site", **partition},
            }
        ).partition

    assert read().all_values and not read(clients=3).all_values and read(clients=3).clients == 3


def test_a_split_of_a_source_that_has_none_is_refused() -> None:
    with pytest.raises(
        FedtuneError, match=r"C104.*data.split with data.source = 'jsonl'.*set data.source to hub"
    ):
        config.parse({"data": {"source": "jsonl", "path": "x", "split": "test"}})
