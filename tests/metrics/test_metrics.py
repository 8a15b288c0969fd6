"""Every metric against figures by hand or by another library; patterns that never end are ended."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.metrics import METRICS, metrics_of, wilson
from fedtune.metrics.accuracy import Accuracy
from fedtune.metrics.answer import Answer
from fedtune.metrics.exact_match import ExactMatch
from fedtune.metrics.macro_f1 import MacroF1
from fedtune.metrics.rouge_l import RougeL
from fedtune.rng import stream
from tests import small

SAID = ["The answer is #### 1,000", "#### 7 and then #### 12", "no number at all", "#### 3"]
WANTED = ["#### 1000.0", "#### 12", "#### 5", "#### 4"]
BY_HAND = {
    "accuracy": (["a", "b", "a", "c"], ["a", "b", "b", "c"], {"accuracy": 0.75}),
    "macro-f1": (["a", "a", "a", "b"], ["a", "a", "b", "c"], {"macro_f1": (0.8 + 0 + 0) / 3}),
    "exact-match": (["Yes!", "no  way", "a", ""], ["yes", "No way.", "b", "c"], {"exact_match": 0.5}),
    "rouge-l": (["a b c d", "x"], ["a c d e", "y"], {"rouge_l": 0.375}),
    "answer": (SAID, WANTED, {"answer": 0.5}),
}


@pytest.mark.parametrize("name", METRICS)
def test_figures_by_hand(name: str) -> None:
    said, wanted, figures = BY_HAND[name]
    got = METRICS[name]().measure(said, wanted)
    assert {key: got[key] for key in figures} == pytest.approx(figures)
    assert METRICS[name]().measure(wanted, wanted)[next(iter(figures))] == 1.0
    for key in figures.keys() & {"accuracy", "exact_match", "answer"}:
        assert 0 <= got[f"{key}_low"] < got[key] < got[f"{key}_high"] <= 1


def test_macro_f1_is_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    draw = stream("labels", 1)
    for _ in range(5):
        said, wanted = (
            draw.choice(["a", "b", "c"], 40, p=p).tolist() for p in ([0.8, 0.1, 0.1], [0.6, 0.3, 0.1])
        )
        got = MacroF1().measure(said, wanted)["macro_f1"]
        assert got == pytest.approx(f1_score(wanted, said, average="macro"))


def test_wilsons_interval_covers_as_often_as_it_says() -> None:
    draw = stream("shares", 2)
    for share, count in ((0.9, 30), (0.5, 100), (0.02, 200)):
        ends = [wilson(int(right), count) for right in draw.binomial(count, share, 2000)]
        assert np.mean([low <= share <= high for low, high in ends]) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("options", "said", "wanted", "right"),
    [
        ({"lower": False}, "Yes", "yes", 0.0),
        ({"punctuation": True}, "yes!", "yes", 0.0),
        ({"punctuation": True}, " yes\n", "yes", 1.0),
    ],
)
def test_what_exact_means(options: dict[str, Any], said: str, wanted: str, right: float) -> None:
    assert ExactMatch(**options).measure([said], [wanted])["exact_match"] == right


def test_a_pattern_that_never_ends_is_ended() -> None:
    began = time.perf_counter()
    with pytest.raises(FedtuneError, match=r"takes longer than 0\.1 s"):
        Answer(pattern=r"(a|a)+$", seconds=0.1).measure(["a" * 400 + "b"], ["a"])
    assert time.perf_counter() - began < 20
    with pytest.raises(FedtuneError, match="a regular expression"):
        config.parse(
            {
                "data": {"source": "jsonl", "path": "x", "task": "instruct"},
                "metrics": [{"metric": "answer", "pattern": "("}],
            }
        )


def test_a_metric_of_another_task_is_refused_and_classes_have_theirs_anyway() -> None:
    with pytest.raises(FedtuneError, match=r"metric = 'rouge-l' with data\.task = 'classify'"):
        config.parse({"metrics": [{"metric": "rouge-l"}]})
    assert metrics_of((), "classify") == (Accuracy(), MacroF1()) and metrics_of((), "instruct") == ()


def test_a_missing_package_is_named_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_spec("rouge_score") is not None
    monkeypatch.setattr("fedtune.metrics.rouge_l.find_spec", lambda name: None)
    with pytest.raises(FedtuneError, match=r"pip install 'fedtune\[metrics\]'"):
        RougeL().ready()


def test_a_run_of_classes_says_its_interval_and_macro_f1(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), rounds=1)
    figures = small.play(recipe, tmp_path)[1]
    own = figures["figures"]["federated"]
    assert own["accuracy_low"] <= own["accuracy"] == figures["federated"] <= own["accuracy_high"]
    assert 0 <= own["macro_f1"] <= 1
