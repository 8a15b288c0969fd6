"""fedtune merge: adapters that stock peft wrote become one that stock peft loads, against naive sums of dense
products."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fedtune.aggregate import MERGES, ClientAdapter
from fedtune.cli.merge import RULES
from fedtune.model.base import load
from fedtune.model.export import load_adapter
from fedtune.model.lora_files import read_expert
from fedtune.model.score import score
from fedtune.model.settings import ModelSettings
from fedtune.runtime.merge import SAME
from tests import small
from tests.runtime.merging import apart, deltas, merge
from tests.tiny import SENTENCES


def test_every_merge_has_its_word() -> None:
    assert {SAME.get(word, word) for word in RULES} == MERGES.keys()


@pytest.mark.parametrize(
    ("words", "naive"),
    [
        (["--by", "mean"], lambda t: sum(t) / 3),
        (["--by", "mean", "--weights", "1", "2", "5"], lambda t: (t[0] + 2 * t[1] + 5 * t[2]) / 8),
        (["--by", "selma"], lambda t: sum(t) / 3),
        (["--by", "task", "--set", "lam=0.4"], lambda t: 0.4 * sum(t)),
        (
            ["--by", "ties", "--set", "density=1", "--set", "lam=0.5", "--rank", "32"],
            lambda t: 0.5 * elected(torch.stack(t)),
        ),
    ],
    ids=["mean", "weights", "selma", "task", "ties"],
)
def test_stock_peft_adds_the_merge_of_dense_products(
    words: list[str],
    naive: Callable[[list[torch.Tensor]], torch.Tensor],
    shelf: list[Path],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """Ranks and scales of their own, by module even: patterns and rsLoRA are inside the products."""
    assert merge(shelf, tmp_path / "one", *words) == 0
    each = [deltas(tiny_llama, folder) for folder in shelf]
    assert (
        apart(
            deltas(tiny_llama, tmp_path / "one"),
            {name: naive([one[name] for one in each]) for name in each[0]},
        )
        < 1e-5
    )
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (
        (32, 32) if "--rank" in words else (10, 10)
    )  # 4 + 3 + 3, in q_proj


def elected(tau: torch.Tensor) -> torch.Tensor:
    agree = torch.sign(tau) == torch.where(tau.sum(0) >= 0, 1, -1)
    return (agree * tau).sum(0) / agree.sum(0)


@pytest.mark.parametrize("more", [[], ["--rank", "4"]])
def test_the_mean_of_one_adapter_with_itself_is_that_adapter(
    more: list[str], shelf: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    assert merge([shelf[2]] * 3, tmp_path / "one", *more) == 0
    assert apart(deltas(tiny_llama, tmp_path / "one"), deltas(tiny_llama, shelf[2])) < 1e-6


def test_a_cut_is_the_best_of_its_rank_and_says_what_it_lost(
    shelf: list[Path], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the dense singular values: of the whole, and of the layer that loses most; the card says the
    same, and what went in."""
    assert merge(shelf, tmp_path / "cut", "--rank", "3") == 0
    said = capsys.readouterr().out
    each = [deltas(tiny_llama, folder) for folder in shelf]
    values = {name: torch.linalg.svdvals(sum(one[name] for one in each) / 3) for name in each[0]}
    lost = {name: float(s[3:].norm() / s.norm()) for name, s in values.items()}
    whole = (
        sum(float(s[3:].norm()) ** 2 for s in values.values())
        / sum(float(s.norm()) ** 2 for s in values.values())
    ) ** 0.5
    worst = max(lost, key=lambda name: lost[name])
    found = re.search(
        r"cut to rank 3: (\S+) % of the merged products' norm is lost, at most (\S+) % of a layer's \((.*)\)",
        said,
    )
    assert (
        found
        and float(found[1]) == pytest.approx(100 * whole, rel=1e-2)
        and float(found[2]) == pytest.approx(100 * lost[worst], rel=1e-2)
    )
    assert found[3] == worst
    card = (tmp_path / "cut" / "README.md").read_text()
    assert found[0] in card and all(read_expert(folder).sha256 in card for folder in shelf)


def test_options_of_a_rule_under_another_one(shelf: list[Path], tmp_path: Path) -> None:
    words = [
        "--by",
        "lines",
        "--set",
        "alpha=0.5",
        "--set",
        "beta=2",
        "--set",
        "of=ties",
        "--set",
        "density=0.3",
        "--rank",
        "6",
    ]
    assert merge(shelf, tmp_path / "one", *words) == 0
    answers = [ClientAdapter(number, read_expert(folder).tensors) for number, folder in enumerate(shelf)]
    wanted = MERGES["lines"](alpha=0.5, beta=2.0, of=MERGES["ties"](density=0.3))(answers, 6, 1.0).tensors
    for name, value in load_file(tmp_path / "one" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(value, wanted[name])


@pytest.mark.parametrize("by", sorted(set(RULES) - {"greedy"}))
def test_every_rule_leaves_an_adapter_of_the_sum_of_ranks_and_the_same_bytes(
    by: str, shelf: list[Path], tmp_path: Path
) -> None:
    more = ["--set", "alpha=0.5", "--set", "beta=0.5"] if by == "lines" else []
    for name in ("one", "two"):
        assert merge(shelf, tmp_path / name, "--by", by, *more) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert read_expert(tmp_path / "one").rank == 10


def test_bfloat16_adapters_are_read(shelf: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    shutil.copytree(shelf[0], tmp_path / "half")
    path = tmp_path / "half" / "adapter_model.safetensors"
    save_torch({name: value.bfloat16() for name, value in load_torch(path).items()}, path)
    assert merge([tmp_path / "half"] * 2, tmp_path / "one") == 0
    assert apart(deltas(tiny_llama, tmp_path / "one"), deltas(tiny_llama, tmp_path / "half")) < 1e-5


# --- adapters of runs ---


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three federations of a round each on one base, with seeds of their own."""
    root = tmp_path_factory.mktemp("runs")
    rows = root / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{SENTENCES[i % 6]} {SENTENCES[i % 5]}"}) + "\n" for i in range(60))
    )
    changes = {
        "data__task": "causal-lm",
        "data__max_length": 16,
        "rounds": 1,
        "method__train": {"lr": 0.05, "steps": 6, "batch": 8},
    }
    return [
        small.play(small.recipe(tiny_llama, rows, seed=seed, **changes), root / str(seed))[0].path
        for seed in (1, 2, 3)
    ]


def scores(text: str) -> dict[str, float]:
    return {
        found[1]: float(found[2])
        for found in re.finditer(r"^(.*): perplexity \S+, loss (\S+)$", text, flags=re.M)
    }


def test_a_merge_of_runs_is_scored_and_the_score_is_that_of_the_folder(
    runs: list[Path], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base, adapters one by one, result; the adapter that was written, loaded by fedtune anew, has that
    loss."""
    from fedtune.runtime.folder import existing, recipe_of
    from fedtune.runtime.workspace import workspace_of

    assert merge(runs, tmp_path / "one", "--eval", str(runs[0])) == 0
    said = scores(capsys.readouterr().out)
    assert list(said) == ["base", *(str(run / "adapter") for run in runs), "merged"]
    assert said["merged"] < said["base"]
    assert np.exp(said[str(runs[0] / "adapter")]) == pytest.approx(
        json.loads((runs[0] / "result.json").read_text())["federated"], rel=1e-3
    )
    workspace = workspace_of(recipe_of(existing(runs[0])))
    base = load(ModelSettings(name=str(tiny_llama), threads=1), "causal-lm", (), 1)
    assert score(load_adapter(base, tmp_path / "one"), workspace.test()).loss == pytest.approx(
        said["merged"], abs=1e-4
    )
    assert "on the test set of run" in (tmp_path / "one" / "README.md").read_text()


def test_a_greedy_soup_leaves_out_what_hurts(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third adapter is turned backwards: it is the worst alone, and with it the rest would be worse."""
    bad = tmp_path / "bad"
    shutil.copytree(runs[2] / "adapter", bad)
    path = bad / "adapter_model.safetensors"
    save_file(
        {name: -3 * value if "lora_B" in name else value for name, value in load_file(path).items()}, path
    )
    assert merge([*runs[:2], bad], tmp_path / "one", "--by", "greedy", "--eval", str(runs[0])) == 0
    out = capsys.readouterr().out
    said = scores(out)
    assert said[str(bad)] > said["base"] > said["merged"]
    assert "kept 2 of 3, chosen by that test set" in out and str(bad) not in out.partition("kept 2")[2]
    assert "flatters" in (tmp_path / "one" / "README.md").read_text()


def test_a_run_on_another_base_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs[1] / "adapter", tmp_path / "other")
    path = tmp_path / "other" / "fedtune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "0" * 64}))
    assert merge([runs[0], tmp_path / "other"], tmp_path / "one") == 2
    assert "M304: found base model 000000000000 of" in capsys.readouterr().err
    assert merge([tmp_path / "other"] * 2, tmp_path / "one", "--eval", str(runs[0])) == 2
    assert "which the adapters were made for" in capsys.readouterr().err and not (tmp_path / "one").exists()
