"""What a FedKSeed run leaves: a seed file that rebuilds the model or the adapter to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedtune.cli import main
from fedtune.runtime.checkpoints import load_state
from tests import small, tiny
from tests.methods.kseed import recipe_of

# --- the file of kilobytes ---


def test_a_seed_file_rebuilds_the_model_to_the_bit_and_refuses_another_base(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = recipe_of(tiny_bert, data, {"refresh": 2, "curvature": True})
    folder, _, _ = small.play(recipe, tmp_path)
    left = folder.adapter / "seeds.safetensors"
    assert left.exists() and "fedkseed" in (folder.adapter / "README.md").read_text()
    assert main(["export", str(folder.path), "--as", "seeds", "--to", str(tmp_path / "seeds")]) == 0
    file = tmp_path / "seeds" / "seeds.safetensors"
    assert file.read_bytes() == left.read_bytes() and file.stat().st_size < 2 * 4 * 256 + 2500
    assert main(["export", str(folder.path), "--as", "merged", "--to", str(tmp_path / "merged")]) == 0
    assert (
        main(
            [
                "export",
                "--from-seeds",
                str(file),
                "--base",
                str(tiny_bert),
                "--as",
                "merged",
                "--to",
                str(tmp_path / "rebuilt"),
            ]
        )
        == 0
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "rebuilt" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    merged = load_file(str(tmp_path / "merged" / "model.safetensors"))
    state, _ = load_state(folder, 3, "")
    workspace, link = small.workspace_of(recipe)
    link.method.install(state, workspace.tunable)
    for name, value in workspace.tunable.read().items():
        np.testing.assert_array_equal(merged[name], value)

    capsys.readouterr()
    other = tiny.bert(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra"] = tokenizer["model"]["vocab"].pop(
        "zebra", tokenizer["model"]["vocab"].pop("fox")
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments, code in (
        (["--from-seeds", str(file), "--base", str(other)], "M304"),  # the same weights, another tokenizer
        (["--from-seeds", str(tiny_bert / "config.json"), "--base", str(tiny_bert)], "R403"),
        (["--from-seeds", str(file)], "C103"),
        ([str(folder.path), "--as", "adapter"], "M306"),
    ):
        assert main(["export", *arguments, "--to", str(tmp_path / "no")]) == 2
        assert code in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_an_adapters_seeds_rebuild_the_adapter(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_bert, data, {"space": "adapter", "adapter": {"kind": "lora", "rank": 2}})
    folder, _, _ = small.play(recipe, tmp_path)
    assert main(["export", str(folder.path), "--as", "adapter", "--to", str(tmp_path / "a")]) == 0
    assert (
        main(
            [
                "export",
                "--from-seeds",
                str(folder.adapter),
                "--base",
                str(tiny_bert),
                "--as",
                "adapter",
                "--to",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
