"""How fast each part of a tail without blocks learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import config
from fedtune.aggregate import Mean
from fedtune.errors import FedtuneError
from fedtune.methods.sfprompt import SFPromptTable
from fedtune.methods.sfprompt_work import Share
from fedtune.model.base import load
from fedtune.model.encode import encode
from fedtune.model.settings import ModelSettings
from tests import small, tiny

WIDTH = 32
VECTORS, MATRICES, PROMPTS, HEAD = 1e-2, 1.2e-3, 1e-2, 1e-3  # docs/rates.md; a matrix's goes with 384 / width


def moved(model: Path, task: str, train: dict[str, Any], **changes: Any) -> dict[str, float]:
    """How far the first step of Adam takes any number of each tensor: its learning rate, where it moves."""
    labels = ("a", "b") if task == "classify" else ()
    base = load(ModelSettings(name=str(model)), task, labels, 1)
    settings = SFPromptTable(head=1, prompts=2, train={"steps": 1, "batch": 6, **train}, **changes)
    method = settings.with_rates(WIDTH).build(1, Mean())
    tunable = method.prepare(base, 1)
    before = {name: value.copy() for name, value in tunable.read().items()}
    session = tunable.net.own_body.open(1, 0, tunable.net.wishes())
    Share(tunable, encode(tiny.texts(), base, max_length=16), method.settings, session, 5, (0, 1)).work()
    session.close()
    return {name: float(np.abs(value - before[name]).max()) for name, value in tunable.read().items()}


def test_a_pretrained_pooler_is_trained_as_matrices_are(tiny_bert: Path) -> None:
    steps = moved(tiny_bert, "classify", {})
    dense = "bert.pooler.dense."
    assert steps == pytest.approx(
        {
            "prompts": PROMPTS,
            dense + "weight": MATRICES,
            dense + "bias": VECTORS,
            "classifier.weight": HEAD,
            "classifier.bias": HEAD,
        },
        rel=1e-2,
    )


def test_a_vocabulary_of_its_own_is_trained_as_matrices_are(tmp_path: Path) -> None:
    steps = moved(tiny.llama(tmp_path), "causal-lm", {})
    assert steps == pytest.approx(
        {"prompts": PROMPTS, "lm_head.weight": MATRICES, "model.norm.weight": VECTORS}, rel=1e-2
    )


def test_a_rate_that_is_given_is_that_of_all(tiny_bert: Path) -> None:
    steps = moved(tiny_bert, "classify", {"lr": 3e-3})
    assert steps.pop("prompts") == pytest.approx(PROMPTS, rel=1e-2)
    assert list(steps.values()) == pytest.approx([3e-3] * 4, rel=1e-2)


def test_matrices_have_the_rate_that_is_given_for_them(tiny_bert: Path) -> None:
    steps = moved(tiny_bert, "classify", {"lr": 3e-3}, matrix_lr=5e-4)
    assert steps["bert.pooler.dense.weight"] == pytest.approx(5e-4, rel=1e-2)
    assert steps["bert.pooler.dense.bias"] == pytest.approx(3e-3, rel=1e-2)


@pytest.mark.parametrize("changes", [{"tail": 1}, {"lora_rank": 2}])
def test_it_is_refused_where_other_weights_are_matrices(changes: dict[str, Any], tiny_bert: Path) -> None:
    method = {"type": "sfprompt", "matrix_lr": 1e-4, **changes}
    with pytest.raises(FedtuneError, match="matrix_lr"):
        small.recipe(tiny_bert, tiny_bert, method=method)


def test_the_rates_of_a_run_are_numbers(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), method={"type": "sfprompt"})
    method: Any = config.with_rates(recipe).method
    assert (method.train.lr, method.matrix_lr) == (VECTORS, MATRICES)
