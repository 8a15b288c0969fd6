"""The card of a merged adapter: what went in, by which rule, what was lost, and where its scores flatter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedtune.runtime.folder import RunFolder
from fedtune.runtime.merge import Asked, Merged, card, cost

EXPERTS: Any = [
    SimpleNamespace(path=Path(name), sha256=name * 8, config={"base_model_name_or_path": "tiny"})
    for name in "ab"
]
SCORE: Any = SimpleNamespace(name="accuracy", metric=0.75)
MERGED = Merged(3, 0.125, ("layer.1", 0.25), {}, [Path("a"), Path("b")], 0, ["names agree"])


def test_what_went_in_and_what_was_lost() -> None:
    text = card(Asked("mean"), EXPERTS, [1.0, 2.5], MERGED, None)
    assert text.splitlines() == [
        "---",
        "library_name: peft",
        "base_model: tiny",
        "tags: [fedtune, merged]",
        "---",
        "",
        "# 2 LoRA adapters merged by mean",
        "",
        "| adapter | SHA-256 of its tensors | weight |",
        "|---|---|---|",
        "| a | aaaaaaaa | 1 |",
        "| b | bbbbbbbb | 2.5 |",
        "",
        "- rule: mean, on the products B A",
        "- rank 3, alpha 3: scale 1",
        "- names agree",
        "- cut to rank 3: 12.5 % of the merged products' norm is lost, at most 25 % of a layer's (layer.1)",
        "- privacy: that of the adapters; merging adds none",
    ]
    assert text.endswith("\n")


def test_options_and_the_base_that_was_meant() -> None:
    asked = Asked("ties", {"density": "0.2", "lam": "1"}, base="elsewhere")
    text = card(asked, EXPERTS, [1.0, 1.0], replace(MERGED, plain=2), None)
    assert "base_model: elsewhere\n" in text
    assert "- rule: ties (density = 0.2, lam = 1), on the products B A\n" in text
    assert "- 2 tensors that are no LoRA pairs were averaged\n" in text
    assert not any("averaged" in line for line in cost(MERGED))
    nameless: Any = SimpleNamespace(path=Path("c"), sha256="", config={})
    assert "base_model: \n" in card(Asked("mean"), [nameless], [1.0], MERGED, None)


def test_scores_name_the_run_and_a_choice_by_them_flatters() -> None:
    run, made = RunFolder(Path("runs/r7")), replace(MERGED, used=[Path("b")], scores={"merged": SCORE})
    text = card(Asked("greedy"), EXPERTS, [1.0, 1.0], made, run)
    assert "- merged: accuracy 0.7500 on the test set of r7\n" in text
    assert "the score of the merged one flatters" in text and "| a |" not in text and "| b |" in text
    assert "flatters" not in card(Asked("mean"), EXPERTS, [1.0, 1.0], made, run)
    assert "accuracy" not in card(Asked("mean"), EXPERTS, [1.0, 1.0], made, None)
