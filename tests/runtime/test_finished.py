"""What is found again of a run's folder: its adapter, its scores, where its base is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.runtime.finished import from_origin, loaded, scores_of
from fedtune.runtime.folder import RunFolder
from tests import small


def test_a_relative_base_is_meant_from_where_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, run, here = (tmp_path / name for name in ("home", "run", "here"))
    for place in (home / "models" / "tiny", run, here):
        place.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert from_origin("models/tiny", run) == "models/tiny"  # nobody knows where it began
    (run / "origin.json").write_text(json.dumps({"working_directory": str(home)}))
    assert from_origin("models/tiny", run) == str(home / "models" / "tiny")
    assert from_origin("models/other", run) == "models/other"
    (here / "models" / "tiny").mkdir(parents=True)
    assert from_origin("models/tiny", run) == "models/tiny"  # there is one here


def test_scores_are_those_of_the_round_that_was_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert scores_of(folder, 2) is None
    folder.write_json("result.json", {"kept_round": 2, "federated": 0.5})
    assert scores_of(folder, 2) == {"kept_round": 2, "federated": 0.5}
    assert scores_of(folder, 3) is None
    folder.write_json("result.json", {})
    assert scores_of(folder, 1) is None


def test_an_adapter_is_loaded_from_its_run_and_the_last_one_where_there_is_another(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    run = small.play(small.recipe(tiny_bert, data, rounds=1), tmp_path)[0].path

    def values(**how: str) -> dict[str, np.ndarray]:
        tunable = loaded(run, **how)
        assert tunable.base.task == "classify" and tunable.base.device.type == "cpu"
        assert tunable.base.labels == ("animals", "music", "weather")
        return dict(tunable.read())

    best = values()
    assert all(np.array_equal(value, best[name]) for name, value in values(which="last").items())
    shutil.copytree(run / "adapter", run / "adapter-last")
    (file,) = (run / "adapter-last").glob("*.safetensors")
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    assert all(np.array_equal(value, best[name]) for name, value in values().items())
    assert all(np.array_equal(value, 2 * best[name]) for name, value in values(which="last").items())
    own = loaded(run / "adapter-last").read()  # an exported folder is an adapter by itself
    assert all(np.array_equal(value, 2 * best[name]) for name, value in own.items())
    (tmp_path / "elsewhere").symlink_to(tiny_bert)
    assert loaded(run, base=str(tmp_path / "elsewhere")).base.name == str(tmp_path / "elsewhere")
