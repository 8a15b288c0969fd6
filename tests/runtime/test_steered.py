"""fedtune eval and fedtune predict with --steer: a run's model moves a bigger one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from tests import small


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on instructions, with its rows."""
    folder = tmp_path_factory.mktemp("steered")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("fox", "cat", "dog") * 16]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = small.tree(tiny_llama, folder / "rows.jsonl", rounds=1)
    tree["method"]["train"] |= {"steps": 10, "lr": 0.05}
    tree["data"] |= {"task": "instruct", "max_length": 40}
    fedtune.simulate(tree, runs=folder, stem="run")
    return folder


def said(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    assert main(["eval", str(place / "run"), *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_runs_own_base_steered_scores_as_the_run(
    place: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose weight, when it is looked for, is 1; 0 is the base."""
    own = said(place, capsys)
    found = said(place, capsys, "--steer", str(tiny_llama))
    assert found["steer"] == {"model": str(tiny_llama), "weight": pytest.approx(1, abs=5e-3)}
    assert (
        found["loss"] == pytest.approx(own["loss"], rel=1e-3)
        and found["clients"].keys() == own["clients"].keys()
    )
    base = said(place, capsys, "--steer", str(tiny_llama), "--steer-weight", "0")
    assert base["loss"] > own["loss"] + 0.1 and "steer" not in own
    of_file = ("--data", str(place / "rows.jsonl"))
    one, two = said(place, capsys, *of_file), said(place, capsys, *of_file, "--steer", str(tiny_llama))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3) and two["steer"]["weight"] > 0.9


def test_predictions_of_a_run_and_of_its_export(place: Path, tiny_llama: Path, tmp_path: Path) -> None:
    fedtune.export(place / "run", tmp_path / "adapter")
    rows = place / "rows.jsonl"
    for source in (place / "run", tmp_path / "adapter"):
        plain = list(fedtune.predict(source, rows, "prompt", tokens=4))
        other = list(fedtune.predict(source, rows, "prompt", tokens=4, steer=str(tiny_llama)))
        assert [row["prediction"] for row in other] == [row["prediction"] for row in plain]
        (found,) = {row["steer_weight"] for row in other}
        assert found == pytest.approx(1, abs=5e-3)
        (still,) = {
            row["steer_weight"]
            for row in fedtune.predict(
                source, rows, "prompt", tokens=4, steer=str(tiny_llama), steer_weight=0.5
            )
        }
        assert still == 0.5


def test_mistakes_are_sentences(place: Path, tiny_bert: Path) -> None:
    run = place / "run"
    with pytest.raises(FedtuneError, match="C103: found --steer-weight 1 without --steer"):
        fedtune.evaluate(run, steer_weight=1)
    with pytest.raises(FedtuneError, match="C103: found --steer-weight -1"):
        fedtune.evaluate(run, steer="big", steer_weight=-1)
    with pytest.raises(FedtuneError, match="M306: found --steer self for a model without experts"):
        fedtune.evaluate(run, steer="self")
    with pytest.raises(FedtuneError, match="C103: found --what with --steer"):
        fedtune.evaluate(run, what=["forgetting"], steer="big")
    with pytest.raises(FedtuneError, match="M303"):
        fedtune.evaluate(run, steer=str(tiny_bert), steer_weight=1)
