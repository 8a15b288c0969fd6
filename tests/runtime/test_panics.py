"""A library in Rust that panics over somebody's file fails what it was asked for, and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.panics import panics_as_errors
from tests import small

ENDLESS = {"Regex": "((([a-z ])+)+)+0"}  # goes back and forth over a text until its library gives up


def spoilt(model: Path, folder: Path) -> Path:
    """A model with a tokenizer that gives up on texts which are long enough."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tree = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": ENDLESS, "behavior": "Isolated", "invert": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tree["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("together", [1, 2])
def test_a_tokenizer_that_gives_up_is_a_sentence(
    together: int, tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small.write_recipe(
        tmp_path / "recipe.toml",
        spoilt(tiny_bert, tmp_path / "model"),
        data,
        method__train__together=together,
    )
    assert main(["simulate", str(recipe), "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "M301" in said and "Regex" in said and "Traceback" not in said and "X900" not in said
    with pytest.raises(FedtuneError, match="M301"):
        fedtune.simulate(recipe, runs=tmp_path / "again")


def test_what_is_no_panic_passes() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), ValueError("x")):
        with pytest.raises(type(error)), panics_as_errors():
            raise error
