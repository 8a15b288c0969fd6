"""Adapters that do not fit together, and merges that are asked for wrongly: one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.runtime.merging import merge, stock


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "ties", "--set", "density=0"], "C102: found density = 0"),
        (
            ["--by", "ties", "--set", "p=0.5"],
            "C103: found --set p for ties, expected one of its options (density, lam)",
        ),
        (
            ["--by", "mean", "--set", "lam=1"],
            "C103: found --set lam for mean, expected one of its options (none)",
        ),
        (["--by", "dare", "--set", "p=half"], "C103: found --set p=half, expected a number"),
        (["--by", "dare", "--set", "seed=1.5"], "C103: found --set seed=1.5, expected a whole number"),
        (["--set", "lam"], "C103: found --set 'lam', expected OPTION=VALUE"),
        (
            ["--by", "lines", "--set", "beta=1"],
            "C103: found lines without alpha, expected --set alpha=NUMBER",
        ),
        (["--by", "lines", "--set", "of=greedy"], "C103: found --set of=greedy"),
        (["--weights", "1", "2"], "C103: found --weights 1 2 with --by mean, expected 3 positive numbers"),
        (["--weights", "1", "2", "-1"], "C103: found --weights 1 2 -1"),
        (
            ["--by", "selma", "--weights", "1", "2", "3"],
            "with --by selma, expected no weights, because all adapters count equally",
        ),
        (["--rank", "0"], "C102: found --rank 0"),
        (["--by", "greedy"], "C103: found --by greedy without --eval"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_a_sentence(
    words: list[str], said: str, shelf: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(shelf, tmp_path / "one", *words) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def other_base(model: Path, folder: Path) -> None:
    change(stock(model, folder, 5, r=2), base_model_name_or_path="elsewhere/model")


def whole_head(model: Path, folder: Path) -> None:
    stock(model, folder, 5, r=2, modules_to_save=["lm_head"])


def later_variant(model: Path, folder: Path) -> None:
    change(stock(model, folder, 5, r=2), use_something_new={"groups": 4})


def changed_base(model: Path, folder: Path) -> None:
    change(stock(model, folder, 5, r=2), init_lora_weights="pissa")


def dora(model: Path, folder: Path) -> None:
    stock(model, folder, 5, r=2, use_dora=True)


def other_kind(model: Path, folder: Path) -> None:
    change(stock(model, folder, 5, r=2), peft_type="IA3")


def cut(model: Path, folder: Path) -> None:
    path = stock(model, folder, 5, r=2) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_rank(model: Path, folder: Path) -> None:
    change(stock(model, folder, 5, r=2), r=4)


def nan(model: Path, folder: Path) -> None:
    path = stock(model, folder, 5, r=2) / "adapter_model.safetensors"
    save_file({name: value * np.nan for name, value in load_file(path).items()}, path)


def nothing(model: Path, folder: Path) -> None:
    folder.mkdir()


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_base, "M304: found base model elsewhere/model of"),
        (whole_head, "M305: found 'lm_head.weight', which is no LoRA pair, in"),
        (later_variant, "M306: found LoRA with use_something_new in"),
        (changed_base, "M306: found LoRA with init_lora_weights = pissa"),
        (dora, "M306: found DoRA in"),
        (other_kind, "M306: found an adapter of type IA3"),
        (cut, "M304: found no adapter in"),
        (wrong_rank, "M305: found rank 2 of"),
        (nan, "W607: found NaN or Inf in"),
        (nothing, "expected adapter_config.json and adapter_model.safetensors"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_in_a_sentence(
    make: Callable[[Path, Path], None],
    said: str,
    shelf: list[Path],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tiny_llama, tmp_path / "odd")
    assert merge([shelf[0], tmp_path / "odd"], tmp_path / "one") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "one").exists()
