"""fedtune predict says what the scores were made of, of a run and of its export, and keeps the user's rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from tests import small, tiny

MINE = ("prediction", "probability", "probabilities")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("predict")
    tree = small.tree(tiny.bert(place / "model"), small.write_rows(place), rounds=2)
    tree["method"]["train"] |= {"steps": 20, "lr": 0.02}
    return fedtune.simulate(tree, runs=place / "runs").folder


def asked(folder: Path) -> Path:
    file = folder / "asked.jsonl"
    rows = [{"text": row["text"], "own": number} for number, row in enumerate(small.rows(20))]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": " ", "own": 20}]))
    return file


def test_labels_are_those_of_the_scores_and_rows_stay(run: Path, tmp_path: Path) -> None:
    said = list(fedtune.predict(run, asked(tmp_path), batch=3))
    assert [row["own"] for row in said] == list(range(21)) and {said[-1][key] for key in MINE} == {None}
    for row in said[:-1]:
        assert row["probability"] == max(row["probabilities"].values())
        assert row["probabilities"][row["prediction"]] == row["probability"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    file = tmp_path / "known.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in small.rows(20)))
    right = sum(
        row["prediction"] == known["label"] for row, known in zip(said[:-1], small.rows(20), strict=True)
    )
    assert right / 20 == fedtune.evaluate(run, file)["value"]


def test_an_export_says_the_same(run: Path, tmp_path: Path) -> None:
    fedtune.export(run, tmp_path / "adapter")
    one, other = (list(fedtune.predict(place, asked(tmp_path))) for place in (run, tmp_path / "adapter"))
    assert [row["prediction"] for row in one] == [row["prediction"] for row in other]
    assert [row.get("probability") for row in one] == pytest.approx([row.get("probability") for row in other])


def test_a_table_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.csv"
    file.write_text("note,own\n" + "".join(f"{row['text']},{n}\n" for n, row in enumerate(small.rows(5))))
    assert main(["predict", str(run), str(file), "--column", "note", "--to", str(tmp_path / "said.csv")]) == 0
    with (tmp_path / "said.csv").open() as said:
        rows = list(csv.DictReader(said))
    assert [row["own"] for row in rows] == list("01234")
    assert rows[0].keys() == {"note", "own", "prediction", "probability"}
    assert main(["predict", str(run), str(file), "--column", "note"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prediction"] for line in lines] == [row["prediction"] for row in rows]


def test_mistakes_are_sentences(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="M304: found neither a run nor an adapter"):
        list(fedtune.predict(tmp_path, asked(tmp_path)))
    with pytest.raises(FedtuneError, match="D204: found no column 'note'"):
        list(fedtune.predict(run, asked(tmp_path), "note"))
    with pytest.raises(FedtuneError, match="D201"):
        list(fedtune.predict(run, tmp_path / "nothing.jsonl"))


def test_a_file_begins_with_its_first_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No empty file where the model does not load, and a row without text first decides no columns."""
    file, target = tmp_path / "asked.jsonl", tmp_path / "said.csv"
    file.write_text('{"text": " "}\n{"text": "the fox"}\n')
    assert main(["predict", str(tmp_path / "none"), str(file), "--to", str(target)]) == 2
    assert "M304" in capsys.readouterr().err and not target.exists()
    assert main(["predict", str(run), str(file), "--to", str(tmp_path / "said.txt")]) == 2
    assert main(["predict", str(run), str(file), "--to", str(target)]) == 0
    with target.open() as said:
        first, second = csv.DictReader(said)
    assert first.keys() == second.keys() == {"text", "prediction", "probability"}
    assert first["probability"] == "" and float(second["probability"]) > 0


def test_responses_of_an_instructed_model(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "response": word} for word in ("fox", "cat", "dog") * 8]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = small.tree(tiny.llama(tmp_path / "model"), file, rounds=1)
    tree["data"] |= {"task": "instruct", "max_length": 40}
    run = fedtune.simulate(tree, runs=tmp_path / "runs").folder
    unanswered = tmp_path / "asked.jsonl"
    unanswered.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:5]))
    said = list(fedtune.predict(run, unanswered, tokens=4, batch=2))
    again = list(fedtune.predict(run, file, tokens=4, batch=3))[:5]  # the responses of the file are not read
    assert [row["prediction"] for row in said] == [row["prediction"] for row in again]
    assert [row["prompt"] for row in said] == [row["prompt"] for row in rows[:5]]
