"""Which rows of a batch train: scores by hand, no padding in them, nothing where all are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model.batch_choice import BatchChoice, evaluating, nuclear_norm
from fedtune.model.tunable import attach
from fedtune.model.uds import Uds
from fedtune.rng import stream
from tests import small
from tests.tables import adapter_of

CAUSAL: dict[str, Any] = {"data__task": "causal-lm", "data__max_length": 24, "partition__clients": 2}


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 7)])
def test_the_norm_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    logits = stream("uds test", *shape).normal(size=shape) * 3
    assert nuclear_norm(torch.from_numpy(logits)) == pytest.approx(np.linalg.svd(logits)[1].sum(), rel=1e-6)


@pytest.fixture(scope="module")
def tuned(workspace: Any) -> tuple[Any, Any]:
    return attach(workspace.base("causal"), adapter_of(kind="lora", rank=2), 1), workspace.encoded("causal")


def test_rows_are_scored_by_hand(tuned: tuple[Any, Any]) -> None:
    """Norm and distance in float64, with every row alone; the buffer holds what trained, and no more."""
    tunable, encoded = tuned
    choice, s = BatchChoice(Uds(keep=0.5, alpha=2.0, buffer=3), tunable, encoded, 7), 2.0
    seen: list[np.ndarray] = []
    for indices in ([0, 1, 2, 3], [3, 2, 1]):
        scores, places = [], []
        for index in indices:
            ids = torch.from_numpy(encoded[index]["input_ids"]).long()[None]
            with evaluating(tunable), torch.no_grad():
                logits = tunable.net(input_ids=ids).logits[0].double().numpy()
            left, right = (
                choice.side(name, rows, columns).double().numpy()
                for name, rows, columns in (("tokens", len(logits), 8), ("words", logits.shape[1], 128))
            )
            place = (left.T @ logits @ right).reshape(-1)
            far = np.mean([np.linalg.norm(place - other) for other in seen]) if seen else 0.0
            scores.append(np.linalg.svd(logits)[1].sum() + s * far)
            places.append(place)
        best = sorted(np.argsort(scores)[::-1][: round(len(indices) / 2)].tolist())
        assert choice.kept([indices]) == [[indices[n] for n in best]]
        seen = [*seen, *(places[n] for n in best)][-3:]
    assert len(choice.seen) == 3
    np.testing.assert_allclose(np.stack([one.numpy() for one in choice.seen]), seen, rtol=1e-3, atol=1e-3)


def test_projections_keep_lengths_on_average() -> None:
    choice = BatchChoice(Uds(keep=0.5), None, None, 7)  # type: ignore[arg-type]
    logits = torch.from_numpy(stream("uds lengths").normal(size=(30, 500)).astype(np.float32))
    _, place = choice.looked_at(logits)
    assert float(place.norm()) == pytest.approx(float(logits.norm()), rel=0.2)


def test_modes_come_back(tuned: tuple[Any, Any]) -> None:
    tunable, _ = tuned
    modes = [module.training for module in tunable.net.modules()]
    with evaluating(tunable):
        assert not any(module.training for module in tunable.net.modules())
    assert modes == [module.training for module in tunable.net.modules()]


def test_all_rows_are_the_plain_run_to_the_bit(tiny_llama: Path, tmp_path: Path) -> None:
    data = small.write_rows(tmp_path)
    ends = [
        small.play(
            small.recipe(tiny_llama, data, rounds=1, **CAUSAL, method__train__uds=table), tmp_path / str(n)
        )[1]["state_sha256"]
        for n, table in enumerate(({}, {"keep": 1.0, "alpha": 3.0}, {"keep": 0.5}, {"keep": 0.5}))
    ]
    assert ends[0] == ends[1] != ends[2] == ends[3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__train__uds": {"keep": 0.5}}, "data.task = 'classify'"),
        ({"method__train__uds": {"keep": 0.0}}, "keep"),
        ({"method": {"type": "sfprompt", "tail": 1, "train": {"uds": {"keep": 0.5}}}}, "a split model"),
        (
            {
                **CAUSAL,
                "method": {"type": "fedkseed", "estimator": "spsa", "train": {"uds": {"keep": 0.5}}},
            },
            "clients that walk",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    changes: dict[str, Any], said: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        small.recipe(tiny_bert, tmp_path / "rows.jsonl", **changes)
